// The relative bias by position in the sm90 backward: what a stage of queries brings for it, and its values in S^T.
//
//   bias_ij = position[clip(p_i - j)]
//
// The warp that fetches Q and dO also writes a window of the table for each tile (write_window), from the last key and first
// query to the first key and last query. A key warp adds half the bias to its 16 rows of S^T: blocks of 8 x 8 on the same
// diagonal share a pair of the window's values a thread. Calls with a time table: sm80 (api.cpp).
#pragma once

#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"
#include "attention/sm90/product.h"

namespace hstu::attention::sm90 {

// In shared memory.
template <int kKeys_, int kQueries_, int kStages>
struct BackwardBias {
    static constexpr int kKeys = kKeys_, kQueries = kQueries_, kWindow = kKeys + kQueries, kDiagonalCols = kQueries + 8;

    // Half the bias of each stage's tile: [kKeys - 1 - key + query], and the same a word later, so that the pair of any two
    // neighbours is aligned in one of them.
    alignas(8) float window[kStages][2][kWindow + 2];
    // Of each key warp: sums of a tile's blocks of 8 x 8 by their diagonals, a row a key and a column a query.
    alignas(8) float diagonals[kKeys / 16][8][kDiagonalCols];
};

template <class Mask>
struct KeyWork;

// One warp.
template <class Bias, class Mask>
__device__ __forceinline__ void write_window(Bias& shared, int stage, const BackwardParams& p,
                                             const KeyWork<Mask>& work, int query0) {
    const Relative& r = p.relative;
    const float* const table = static_cast<const float*>(r.position) + work.head * r.position_head_stride + r.reach;
    const int first = query0 + work.mask.offset - work.col0 - (Bias::kKeys - 1);
#pragma unroll
    for (int i = lane(); i < Bias::kWindow; i += 32) {
        const float half = 0.5f * __ldg(table + clamp_to(first + i, -r.reach, r.reach));
        shared.window[stage][0][i] = shared.window[stage][1][i + 1] = half;
    }
}

// S^T -> half of (alpha S^T + bias) in a warp's 16 rows, which are the block's keys from 16 strip on.
template <int kRows, class Bias>
__device__ __forceinline__ void add_half_bias(Accumulator<kRows>& s, const Bias& shared, int stage, int strip,
                                              float half_alpha) {
    static_assert(kRows == Bias::kQueries);
    const int lane = lane_anew(), place = Bias::kKeys - 1 - (16 * strip + lane / 4) + lane % 4 * 2;
    const float* const from = shared.window[stage][place % 2] + place + place % 2;
    const auto pair = [&](int n) { return *reinterpret_cast<const float2*>(from + 8 * n); };
    float2 below = pair(-1);  // of the key 8 further
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
        const float2 above = pair(n);
        float* const x = s.x + 4 * n;
        x[0] = fmaf(half_alpha, x[0], above.x), x[1] = fmaf(half_alpha, x[1], above.y);
        x[2] = fmaf(half_alpha, x[2], below.x), x[3] = fmaf(half_alpha, x[3], below.y);
        below = above;
    }
}

}  // namespace hstu::attention::sm90
