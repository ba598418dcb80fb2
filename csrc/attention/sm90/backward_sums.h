// The gradients of the tables of the relative bias, added up in the key warpgroups of the sm90 backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// A thread has G in fp32 for the 8 x 8 blocks of its warp's 16 keys, a query tile after another, while products are under
// way.
//   times       A lane has a column of sums in shared memory, one a bucket. Of a piece (backward_bias.h) with one bucket it
//               adds all elements to it at once, else each element finds its bucket. Where differences may be large, it adds
//               up those behind the first edge, behind the second, ...: a bucket's sum is the difference of two.
//   positions   Blocks on the same diagonal are added first. Through shared memory each lane then gets what all keys have
//               of its distances, which it adds to global memory. Tiles beyond the table's reach are one sum.
// Global sums are added to by atomics, in fp32 or, where deterministic, exactly: all before has a fixed order.
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
    using Base::code_of, Base::read_times, Base::shared, Base::strip;
    using typename Base::Bucket, typename Base::Notes;
    static constexpr int kQueries = Bias::kQueries, kPieces = Bias::kPieces;

    float* positions;                   // of this head, at distance 0
    float before = 0.0f, after = 0.0f;  // clipped distances: at -reach and at reach
    float far = 0.0f;                   // of far_bucket, for which there are no columns
    int far_bucket = PieceCode::kBuckets;

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
        if (p.dposition != nullptr)
            add_positions(g, total, p, work.head, query0 + work.mask.offset - work.col0 - 16 * strip);
    }

    // At the end of a work.
    __device__ __forceinline__ void finish(const BackwardParams& p, int head) {
        if (p.dtime != nullptr) add_far(p, head, PieceCode::kBuckets);
        if (p.dposition == nullptr) return;
        const float low = sum_of_warp(before), high = sum_of_warp(after);
        if (lane() != 0) return;
        const TableGradients to = sums_of(p, head);
        to.add(to.position, to.exact_position, -p.relative.reach, low);
        to.add(to.position, to.exact_position, p.relative.reach, high);
    }

  private:
    __device__ __forceinline__ float* column() const { return &shared.sums[strip][0][lane_anew()]; }

    template <class Mask>
    __device__ __forceinline__ void add_times(const float* x, float all, const Notes& notes, int piece,
                                              const BackwardParams& p, const KeyWork<Mask>& work, int query0) {
        const PieceCode code = code_of(notes, piece);
        const int first = code.first(), last = code.last();
        float* const to = column();
        if (first == last) {
            if (last < PieceCode::kBuckets) {
                to[32 * last] += all;
            } else {
                if (far_bucket != last) add_far(p, work.head, last);
                far += all;
            }
            return;
        }
        float t[16];
        read_times(t, notes, code, piece, p, work, query0);
        if (code.exact()) return add_one_by_one(to, t, x);
        float left = all;  // in the bucket at hand and behind it
#pragma unroll 1
        for (int b = first; b <= last; ++b) {
            float behind[4] = {};
            if (b < last) {
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    behind[i % 4] = fmaf(__saturatef(t[i] - static_cast<float>(b)), x[i], behind[i % 4]);
            }
            const float next = (behind[0] + behind[1]) + (behind[2] + behind[3]), sum = left - next;
            left = next;
            if (b < PieceCode::kBuckets) {
                to[32 * b] += sum;
            } else {
                if (far_bucket != b) add_far(p, work.head, b);
                far += sum;
            }
        }
    }
    __device__ __forceinline__ void add_far(const BackwardParams& p, int head, int next) {
        const float sum = sum_of_warp(far);
        const TableGradients to = sums_of(p, head);
        if (lane() == 0) to.add(to.time, to.exact_time, min_of(far_bucket, p.relative.num_buckets), sum);
        far = 0.0f, far_bucket = next;
    }
    // Four elements at a time: what the column has is read for all four before it is written.
    __device__ __forceinline__ void add_one_by_one(float* to, const float (&t)[16], const float* x) const {
        const auto sum_at = [&](int place) { return reinterpret_cast<float*>(reinterpret_cast<char*>(to) + place); };
#pragma unroll
        for (int n = 0; n < 16; n += 4) {
            int at[4];
            float sum[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float size = fabsf(t[n + i]);
                const typename Bias::Quarter& quarter = shared.quarters[quarter_of(size)];
                at[i] = quarter.place + (size >= quarter.edge ? Bias::kRowBytes : 0);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[i] = *sum_at(at[i]) + x[n + i];
#pragma unroll
                for (int j = 0; j < i; ++j)
                    if (at[j] == at[i]) sum[i] += x[n + j];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) *sum_at(at[i]) = sum[i];
        }
    }

    // corner: the distance of the first key and query.
    __device__ __forceinline__ void add_positions(const Accumulator<kQueries>& g, float total, const BackwardParams& p,
                                                  int head, int corner) {
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
        const int first = corner - 15 + lane;
        if (!p.deterministic && corner - 15 >= -reach && corner + kQueries <= reach) {
            float* const to = positions + first;
            const float scale = 0.5f * p.inv_scaling;
            add_to_global(to, scale * of_distance[0]);
            add_to_global(to + 32, scale * of_distance[1]);
            if (lane < kCols + 7 - 64) add_to_global(to + 64, scale * of_distance[2]);
            return;
        }
        const TableGradients to = sums_of(p, head);
#pragma unroll 1
        for (int i = 0; i < 3; ++i) {
            const float x = i == 0 ? of_distance[0] : i == 1 ? of_distance[1] : of_distance[2];
            if (32 * i + lane < kCols + 7)
                to.add(to.position, to.exact_position, clamp_to(first + 32 * i, -reach, reach), x);
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
    for (int i = lane(); i < PieceCode::kBuckets * 32; i += 32) sums[i] = 0.0f;
    __syncwarp();
}
template <class Bias>
__device__ __forceinline__ void flush_time_sums(Bias& shared, int strip, const BackwardParams& p, int head) {
    if (p.dtime == nullptr) return;
    const TableGradients to = sums_of(p, head);
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < PieceCode::kBuckets; first += 32) {
        const int b = first + lane();
        if (b >= PieceCode::kBuckets) continue;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < 32; ++i) sum += shared.sums[strip][b][(b + i) % 32];
        if (b <= p.relative.num_buckets) to.add(to.time, to.exact_time, b, sum);
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
        if (!same || p.deterministic) flush(p, strip);  // which works a block takes up depends on the GPU
        if (same) return;
        head = of;
        const float* const time = r.time ? static_cast<const float*>(r.time) + of * r.time_head_stride : nullptr;
        const auto half = [&](int b) { return time ? 0.5f * __ldg(time + min_of(b, r.num_buckets)) : 0.0f; };
        named_sync(1, kThreads);
        for (int b = threadIdx.x % kThreads; b < kTimeBuckets; b += kThreads) {
            shared.buckets[b] = {half(b), half(b + 1) - half(b)};
        }
        for (int i = threadIdx.x % kThreads; i < Bias::kQuarters; i += kThreads) {
            const TimeQuarter& quarter = kQuartersOfTime.at[i];
            const bool last = quarter.bucket >= r.num_buckets;
            shared.quarters[i] = {last ? 0x1p30f : static_cast<float>(quarter.edge_low),
                                  Bias::kRowBytes * min_of(quarter.bucket, r.num_buckets), half(quarter.bucket), half(quarter.bucket + 1)};
        }
        named_sync(1, kThreads);
    }
    __device__ __forceinline__ void flush(const BackwardParams& p, int strip) {
        if (head >= 0 && strip >= 0) flush_time_sums(shared, strip, p, head);
    }
};

}  // namespace hstu::attention::sm90
