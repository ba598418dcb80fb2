// The gradients of the tables of the relative bias, added up in the key warpgroups of the sm90 backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// A thread has G in fp32 for the 8 x 8 blocks of its warp's 16 keys, a query tile after another, while products are under
// way.
//   times       A lane has a column of sums in shared memory, one a bucket. Of a piece (backward_bias.h) with one bucket it
//               adds all elements to it at once, else each element finds its bucket.
//   positions   Blocks on the same diagonal are added first. Through shared memory each lane then gets what all keys have
//               of its distances, which it adds to global memory. Tiles beyond the table's reach are one sum.
// Global sums are added to by atomics in no fixed order: the sm80 family serves deterministic calls.
#pragma once

#include "attention/sm90/backward_bias.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm90 {

// The sums hold 2 G N.
__device__ __forceinline__ TableGradients sums_of(const BackwardParams& p, int head) {
    TableGradients to(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
    to.scale *= 0.5f;
    return to;
}

__device__ __forceinline__ float sum_of_warp(float x) {
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

template <class Bias>
struct KeySums : KeyBias<Bias> {
    using Base = KeyBias<Bias>;
    using Base::code_of, Base::find_buckets, Base::look_up, Base::shared, Base::strip;
    using typename Base::Notes, typename Base::Quarter;
    static constexpr int kQueries = Bias::kQueries, kPieces = Bias::kPieces;

    float* positions;                   // of this head, at distance 0
    float before = 0.0f, after = 0.0f;  // clipped distances: at -reach and at reach
    float far = 0.0f;                   // of far_bucket, for which there are no columns
    int far_bucket = kTimeBuckets;

    __device__ __forceinline__ KeySums(Bias& shared, int strip, int number, const BackwardParams& p, int head)
        : Base(shared, strip, number), positions(sums_of(p, head).position) {}

    template <class Mask>
    __device__ __forceinline__ void add(const Accumulator<kQueries>& g, const Notes& notes, const BackwardParams& p,
                                        const KeyWork<Mask>& work, int query0) {
        float total = 0.0f;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const float* const x = g.x + 16 * piece;
            float part[4] = {};
#pragma unroll
            for (int i = 0; i < 16; ++i) part[i % 4] += x[i];
            const float all = (part[0] + part[1]) + (part[2] + part[3]);
            total += all;
            if (p.dtime != nullptr) add_times(x, all, notes, piece, p, work, query0);
        }
        if (p.dposition != nullptr) add_positions(g, total, p, query0 + work.mask.offset - work.col0 - 16 * strip);
    }

    // At the end of a work.
    __device__ __forceinline__ void finish(const BackwardParams& p, int head) {
        if (p.dtime != nullptr) add_far(p, head, kTimeBuckets);
        if (p.dposition == nullptr) return;
        const float low = sum_of_warp(before), high = sum_of_warp(after), scale = 0.5f * p.inv_scaling;
        if (lane() != 0) return;
        add_to_global(positions - p.relative.reach, scale * low);
        add_to_global(positions + p.relative.reach, scale * high);
    }

  private:
    template <class Mask>
    __device__ __forceinline__ void add_times(const float* x, float all, const Notes& notes, int piece,
                                              const BackwardParams& p, const KeyWork<Mask>& work, int query0) {
        const PieceCode code = code_of(notes, piece);
        float* const column = &shared.sums[strip][0][lane_anew()];
        if (code.one()) {
            if (code.last() < Bias::kBuckets) {
                column[32 * code.last()] += all;
            } else {
                if (far_bucket != code.last()) add_far(p, work.head, code.last());
                far += all;
            }
            return;
        }
        const auto sum_at = [&](int place) {
            return reinterpret_cast<float*>(reinterpret_cast<char*>(column) + place);
        };
        int place[16];
        const auto take = [&](int i, bool past, const Quarter& quarter) {
            place[i] = quarter.place + (past ? Bias::kRowBytes : 0);
        };
        if (look_up(notes, code, piece, take)) {
            // Four elements at a time: what the column has is read for all four before it is written.
#pragma unroll
            for (int n = 0; n < 16; n += 4) {
                float sum[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[i] = *sum_at(place[n + i]) + x[n + i];
#pragma unroll
                    for (int j = 0; j < i; ++j)
                        if (place[n + j] == place[n + i]) sum[i] += x[n + j];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) *sum_at(place[n + i]) = sum[i];
            }
        } else {
            find_buckets(piece, p, work, query0, [&](int n, const int (&bucket)[4]) {
                float* const times = sums_of(p, work.head).time;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float g = n == 0 ? x[i] : n == 1 ? x[4 + i] : n == 2 ? x[8 + i] : x[12 + i];
                    if (bucket[i] < Bias::kBuckets)
                        column[32 * bucket[i]] += g;
                    else
                        add_to_global(times + bucket[i], 0.5f * p.inv_scaling * g);
                }
            });
        }
    }
    __device__ __forceinline__ void add_far(const BackwardParams& p, int head, int next) {
        const float sum = sum_of_warp(far);
        if (lane() == 0 && far_bucket < kTimeBuckets)
            add_to_global(sums_of(p, head).time + far_bucket, 0.5f * p.inv_scaling * sum);
        far = 0.0f, far_bucket = next;
    }

    // corner: the distance of the first key and query.
    __device__ __forceinline__ void add_positions(const Accumulator<kQueries>& g, float total, const BackwardParams& p,
                                                  int corner) {
        const int reach = p.relative.reach;
        if (corner - 15 >= reach) {
            after += total;
            return;
        }
        if (corner + kQueries - 1 <= -reach) {
            before += total;
            return;
        }
        // sum[k] is for the distance corner + 8 (k - 1) + column - row of the thread's place in a block.
        constexpr int kCols = Bias::kDiagonalCols;
        float2 sum[kCols / 8] = {};
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
            float2& to = sum[i / 4 + 1 - i / 2 % 2];
            (i % 2 ? to.y : to.x) += g.x[i];
        }
        const int lane = lane_anew();
        float* const diagonals = &shared.diagonals[strip][0][0];
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kCols / 8; ++k)
            *reinterpret_cast<float2*>(diagonals + lane / 4 * kCols + 8 * k + lane % 4 * 2) = sum[k];
        __syncwarp();
        // The distance corner + j - 15 is in column j - 7 + row.
        static_assert(kCols + 7 > 64 && kCols + 7 <= 96);
        float of_distance[3];
#pragma unroll
        for (int first = 0; first < kCols + 7; first += 32) {
            const int j = first + lane;
            float x[8];
#pragma unroll
            for (int row = 0; row < 8; ++row) {
                const int col = j - 7 + row;
                const bool inside = (first >= 7 || col >= 0) && (first + 32 + row <= kCols + 7 || col < kCols);
                x[row] = inside ? diagonals[row * kCols + col] : 0.0f;
            }
            of_distance[first / 32] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        }
        const float scale = 0.5f * p.inv_scaling;
        const int first = corner - 15 + lane;
        const bool within = corner - 15 >= -reach && corner + kQueries <= reach;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int distance = first + 32 * i;
            if (i < 2 || lane < kCols + 7 - 64)
                add_to_global(positions + (within ? distance : clamp_to(distance, -reach, reach)),
                              scale * of_distance[i]);
        }
    }
};

// Without a relative bias.
struct NoKeySums {
    template <class... Args>
    __device__ __forceinline__ explicit NoKeySums(const Args&...) {}
};

// A warp's sums by bucket: cleared, and handed on to global memory.
template <class Bias>
__device__ __forceinline__ void clear_time_sums(Bias& shared, int strip) {
    float* const sums = &shared.sums[strip][0][0];
    for (int i = lane(); i < Bias::kBuckets * 32; i += 32) sums[i] = 0.0f;
    __syncwarp();
}
template <class Bias>
__device__ __forceinline__ void flush_time_sums(Bias& shared, int strip, const BackwardParams& p, int head) {
    if (p.dtime == nullptr) return;
    const TableGradients to = sums_of(p, head);
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < Bias::kBuckets; first += 32) {
        const int b = first + lane();
        if (b >= Bias::kBuckets) continue;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < 32; ++i) sum += shared.sums[strip][b][(b + i) % 32];
        if (b <= p.relative.num_buckets) add_to_global(to.time + b, to.scale * sum);
    }
    __syncwarp();
    clear_time_sums(shared, strip);
}

// The tables of one head in shared memory, written by all threads of the key warpgroups (named barrier 1), and the sums by
// bucket that are for that head, of a warp that has any (strip >= 0).
template <class Bias>
struct BiasTables {
    Bias& shared;
    int head = -1;

    __device__ __forceinline__ void take_head(const BackwardParams& p, int of, int strip) {
        constexpr int kThreads = 2 * kWarpgroup;
        const Relative& r = p.relative;
        const bool same = head >= 0 && (head == of || (r.time_head_stride == 0 && p.dtime_head_stride == 0));
        if (same) return;
        flush(p, strip);
        head = of;
        const float* const time = r.time ? static_cast<const float*>(r.time) + of * r.time_head_stride : nullptr;
        const auto half = [&](int b) { return time ? 0.5f * __ldg(time + min_of(b, r.num_buckets)) : 0.0f; };
        named_sync(1, kThreads);
        for (int b = threadIdx.x % kThreads; b < kTimeBuckets; b += kThreads) shared.values[b] = half(b);
        for (int i = threadIdx.x % kThreads; i < Bias::kQuarters; i += kThreads) {
            const TimeQuarter& quarter = kQuartersOfTime.at[i];
            const bool last = quarter.bucket >= r.num_buckets;
            shared.quarters[i] = {last ? 0x1p100f : static_cast<float>(quarter.edge()),
                                  Bias::kRowBytes * min_of(quarter.bucket, r.num_buckets), half(quarter.bucket),
                                  half(quarter.bucket + 1)};
        }
        named_sync(1, kThreads);
    }
    __device__ __forceinline__ void flush(const BackwardParams& p, int strip) {
        if (head >= 0 && strip >= 0) flush_time_sums(shared, strip, p, head);
    }
};

}  // namespace hstu::attention::sm90
