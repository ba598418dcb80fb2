// The gradients of the tables of the relative bias, reduced inside the key-stationary blocks of the backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// Times: a thread adds up its elements of a bucket, the warp adds these up, and lane b % 32 keeps the sum of bucket b in a
// register until the block ends. Positions: a thread adds up along the diagonals of its 8 x 8 blocks, shuffles add up
// what the lanes hold of the same distance, and each tile's sums go to global memory. Both are added there by atomics: in
// fp32, or where deterministic exactly (exact_sum.h), since all before has a fixed order.
#pragma once

#include "attention/sm80/exact_sum.h"
#include "attention/sm80/relative.h"

namespace hstu::attention::sm80 {

// Where the sums of one head go.
struct TableGradients {
    float *position, *time;  // at distance 0 and bucket 0; nullptr where not wanted
    int64_t *exact_position = nullptr, *exact_time = nullptr;
    float scale;

    __device__ TableGradients(const BackwardParams& p, int head)
        : position(static_cast<float*>(p.dposition)), time(static_cast<float*>(p.dtime)), scale(p.inv_scaling) {
        const int64_t of_position = head * p.dposition_head_stride + p.relative.reach;
        const int64_t of_time = head * p.dtime_head_stride;
        if (p.table_accum != nullptr) {
            exact_position = p.table_accum + of_position * kExactWords;
            exact_time = p.table_accum + (position_entries(p) + of_time) * kExactWords;
        }
        if (position != nullptr) position += of_position;
        if (time != nullptr) time += of_time;
    }

    __host__ __device__ static int64_t position_entries(const BackwardParams& p) {
        if (p.dposition == nullptr) return 0;
        return (2 * int64_t{p.relative.reach} + 1) * (p.dposition_head_stride ? p.heads : 1);
    }
    __host__ __device__ static int64_t time_entries(const BackwardParams& p) {
        if (p.dtime == nullptr) return 0;
        return (int64_t{p.relative.num_buckets} + 1) * (p.dtime_head_stride ? p.heads : 1);
    }

    __device__ __forceinline__ void add(float* table, int64_t* exact, int index, float x) const {
        if (x == 0.0f) return;
        if (exact_position != nullptr)
            add_exactly(exact + int64_t{index} * kExactWords, scale * x);
        else
            atomicAdd(table + index, scale * x);
    }
};

// A warp's sums by bucket. Lane l has buckets l, l + 32, ...; the sum of one bucket is still spread over the lanes.
struct TimeSums {
    static constexpr int kSlots = ceil_div(kTimeBuckets, 32);
    float at[kSlots] = {};
    int bucket = 0;
    float open = 0.0f;

    __device__ __forceinline__ void add(int of, float x) {
        if (of != bucket) close(of);
        open += x;
    }
    __device__ __forceinline__ void close(int next) {
        for (int step = 16; step > 0; step /= 2) open += __shfl_xor_sync(~0u, open, step);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) at[slot] += bucket == slot * 32 + lane() ? open : 0.0f;
        bucket = next;
        open = 0.0f;
    }
    __device__ __forceinline__ void flush(const TableGradients& to, int num_buckets) {
        if (to.time == nullptr) return;
        close(0);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int b = slot * 32 + lane();
            if (b <= num_buckets) to.add(to.time, to.exact_time, b, at[slot]);
        }
    }

    // A piece's elements by their buckets, which lie from in.first to in.last.
    template <int kSize>
    __device__ __forceinline__ void add_piece(const PieceBuckets& in, const float (&grad)[kSize],
                                              const int (&of)[kSize]) {
        if (in.first == in.last) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum += grad[i];
            return add(in.first, sum);
        }
        // By 32 buckets, and of these only those that occur.
        for (int first = in.first; first <= in.last; first += 32) {
            uint32_t mine = 0;
#pragma unroll
            for (int i = 0; i < kSize; ++i)
                if (static_cast<uint32_t>(of[i] - first) < 32) mine |= 1u << (of[i] - first);
            for (uint32_t left = __reduce_or_sync(~0u, mine); left != 0; left &= left - 1) {
                const int b = first + __ffs(static_cast<int>(left)) - 1;
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < kSize; ++i) sum += of[i] == b ? grad[i] : 0.0f;
                add(b, sum);
            }
        }
    }
};

// Adds the sums of this warp's share of a tile along its diagonals. `tile`: the distance of its first row and column.
template <class Grid>
__device__ __forceinline__ void add_distances(const typename Grid::Acc& grad, const TableGradients& to, int tile,
                                              int reach) {
    if (to.position == nullptr) return;
    // sum[k] in lane (r, q) = (lane / 4, lane % 4) is for distance r - 2 q + 8 (k - kN), below[k] for one less.
    constexpr int kDiagonals = Grid::kN + 2 * Grid::kM;
    float sum[kDiagonals + 1] = {}, below[kDiagonals + 1] = {};
#pragma unroll
    for (int m = 0; m < Grid::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < Grid::kN; ++n) {
                sum[2 * m + half - n + Grid::kN] += grad.x[m][n][half * 2];
                below[2 * m + half - n + Grid::kN] += grad.x[m][n][half * 2 + 1];
            }
        }
    }
    const int r = lane() / 4, q = lane() % 4;
    // Adds `part` of the lane that is `rows` further, where its distance is the same; lanes wrap around into the next k.
    const auto gather = [&](const float (&part)[kDiagonals + 1], int rows, int columns) {
        float found[kDiagonals];
#pragma unroll
        for (int k = 0; k < kDiagonals; ++k) {
            const float sent = r < rows ? part[k + 1] : part[k];
            found[k] = __shfl_sync(~0u, sent, (lane() + 4 * rows) % 32 + columns);
        }
#pragma unroll
        for (int k = 0; k < kDiagonals; ++k) sum[k] += found[k];
    };
    gather(below, 1, 0);
    gather(sum, 2, 1);  // lanes with q = 0, 2 get those with q = 1, 3
    gather(sum, 4, 2);
    if (q != 0) return;
#pragma unroll
    for (int k = 0; k < kDiagonals; ++k)
        to.add(to.position, to.exact_position, clamp_to(tile + r + 8 * (k - Grid::kN), -reach, reach), sum[k]);
}

}  // namespace hstu::attention::sm80
