// The relative bias in the key warpgroups of the SM90 backward.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// A thread has 8 x 8 blocks of S^T; those on the same diagonal of blocks share two values of the position table. Times of
// queries come with Q. Differences below 2^31 are looked up by their quarter of an octave (time_bucket.h) in shared memory,
// which gives an edge and the values on its two sides; others in global memory.
#pragma once

#include "attention/bias.h"
#include "attention/sm90/backward_work.h"
#include "attention/time_lookup.h"

namespace hstu::attention::sm90 {

template <class Mask>
__device__ __forceinline__ RelativeBias<float> bias_of(const BackwardParams& p, const KeyWork<Mask>& work) {
    return RelativeBias<float>(p, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k, work.head);
}

// The time table in shared memory, of the head that kThreads threads (named barrier 1) work at.
template <class Shared, int kThreads>
struct TimeTable {
    const Shared& shared;
    int head = -1;

    __device__ __forceinline__ void take_head(const BackwardParams& p, int of) {
        const Relative& r = p.relative;
        if (r.time == nullptr || (head >= 0 && (r.time_head_stride == 0 || head == of))) return;
        head = of;
        named_sync(1, kThreads);
        const float* const table = static_cast<const float*>(r.time) + of * r.time_head_stride;
        for (int i = threadIdx.x % kThreads; i < 4 * 32; i += kThreads) {
            const TimeQuarter quarter = kQuartersOfTime.at[i];
            shared.time_tables().values[i] = {
                quarter.edge_low, 0.5f * __ldg(table + min_of(quarter.bucket, r.num_buckets)),
                0.5f * __ldg(table + min_of(quarter.bucket + 1, r.num_buckets)), quarter.bucket};
        }
        named_sync(1, kThreads);
    }
};

// S^T -> half of alpha S^T + bias, for a warpgroup's 64 keys from `key` on and the query rows from `row` on.
template <int kRows, class Shared, class Mask>
__device__ __forceinline__ void add_half_bias(Accumulator<kRows>& s, const BackwardParams& p, const Shared& shared,
                                              const KeyWork<Mask>& work, int row, int key, int stage,
                                              float half_alpha) {
    const RelativeBias<float> bias = bias_of(p, work);
    const int first_key = key + Accumulator<kRows>::row();
    {
        // at[k][c]: of element c in a row, in the block of queries n and half h with n - h + 1 = k.
        float at[kRows / 8 + 1][2] = {};
        if (bias.position != nullptr) {
            const int corner = row + bias.offset - (key + threadIdx.x / 32 % 4 * 16);
            const int distance = row + Accumulator<kRows>::col() + bias.offset - first_key - 8;
            if (corner - 15 >= -bias.reach && corner + kRows - 1 <= bias.reach) {
#pragma unroll
                for (int i = 0; i < kRows / 4 + 2; ++i)
                    at[i / 2][i % 2] = __ldg(bias.position + distance + i / 2 * 8 + i % 2);
            } else {
#pragma unroll
                for (int i = 0; i < kRows / 4 + 2; ++i)
                    at[i / 2][i % 2] =
                        __ldg(bias.position + clamp_to(distance + i / 2 * 8 + i % 2, -bias.reach, bias.reach));
            }
        }
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) s.x[i] = fmaf(half_alpha, s.x[i], 0.5f * at[i / 4 - i / 2 % 2 + 1][i % 2]);
    }
    if (bias.time == nullptr) return;
    const auto& times = shared.times(stage);
    int64_t key_times[2];
    uint64_t nearest[2], farthest[2];  // over the rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t t = __ldg(bias.key_times + min_of(first_key + 8 * half, bias.len_k - 1));
        const uint64_t to_low = time_difference(t, times.low), to_high = time_difference(t, times.high);
        nearest[half] = t < times.low ? to_low : t > times.high ? to_high : 0;
        farthest[half] = max_of(to_low, to_high);
        key_times[half] = t;
    }
    const auto value_of = [&](uint32_t x, int& bucket) {
        const auto quarter = shared.time_tables().values[quarter_of(__uint2float_rz(x))];
        bucket = quarter.bucket + (x >= quarter.edge ? 1 : 0);
        return x >= quarter.edge ? quarter.above : quarter.below;
    };
    if (__all_sync(0xffffffff, max_of(farthest[0], farthest[1]) < (uint64_t{1} << 31))) {
        // One bucket for all?
        int first[2], last[2];
        const float value = value_of(static_cast<uint32_t>(nearest[0]), first[0]);
        value_of(static_cast<uint32_t>(nearest[1]), first[1]);
        value_of(static_cast<uint32_t>(farthest[0]), last[0]), value_of(static_cast<uint32_t>(farthest[1]), last[1]);
        const int one = __shfl_sync(0xffffffff, first[0], 0);
        if (__all_sync(0xffffffff, first[0] == one && first[1] == one && last[0] == one && last[1] == one)) {
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) s.x[i] += value;
            return;
        }
        const uint32_t of_key[2] = {static_cast<uint32_t>(key_times[0]), static_cast<uint32_t>(key_times[1])};
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
            const uint4 words = *reinterpret_cast<const uint4*>(times.at + 8 * n + Accumulator<kRows>::col());
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int difference = static_cast<int>((i % 2 ? words.z : words.x) - of_key[i / 2]);
                const uint32_t x = static_cast<uint32_t>(difference < 0 ? -difference : difference);
                int bucket;
                s.x[4 * n + i] += value_of(x, bucket);
            }
        }
        return;
    }
    // Seldom.
#pragma unroll 1
    for (int n = 0; n < kRows / 8; ++n) {
        float add[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint64_t x = time_difference(times.at[8 * n + Accumulator<kRows>::col() + i % 2], key_times[i / 2]);
            add[i] = 0.5f * __ldg(bias.time + min_of(bucket_of(x), bias.num_buckets));
        }
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i)
            if (i / 4 == n) s.x[i] += add[i % 4];
    }
}

}  // namespace hstu::attention::sm90
