// Who adds up the gradients of the relative bias's tables in the SM90 backward, from the G^T that the key warpgroups hand
// out: the query warpgroup those of positions, a warpgroup of its own those of times. A warp has 32 keys.
#pragma once

#include "attention/sm90/relative_times.h"

namespace hstu::attention::sm90 {

__device__ __forceinline__ TableGradients table_gradients(const BackwardParams& p, int head) {
    TableGradients to(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
    to.scale *= 0.5f;  // G^T is handed out twice as large
    return to;
}

template <class Mask>
__device__ __forceinline__ bool keeps_any(const Mask& mask, int row, int rows, int col, int cols) {
    return col < mask.len_k && overlaps(mask.q_range(col, cols), row, rows);
}

// A warp of the query warpgroup: the sums by distance of tile `g`, whose query rows start at `row`.
template <class T, class Mask, class Tile>
__device__ __forceinline__ void add_positions(const BackwardParams& p, const KeyWork<Mask>& work, Tile g, int row,
                                              ClippedSum& clipped) {
    using Strip = GradientStrip<T, Tile, Tile::kDim>;
    constexpr int kKeys = Strip::kKeys, kRows = Tile::kDim;
    const int first = threadIdx.x / 32 % 4 * kKeys, col = work.col0 + first;
    if (p.dposition == nullptr || first >= Tile::kRows || !keeps_any(work.mask, row, kRows, col, kKeys)) return;
    const Strip strip{g, first, 0};
    const int reach = p.relative.reach, corner = row + work.mask.len_k - work.mask.len_q - col;
    const bool above = corner - (kKeys - 1) >= reach, below = corner + kRows - 1 <= -reach;
    if (above || below)
        clipped.add(above ? reach : -reach, strip.sum(), table_gradients(p, work.head));
    else
        DistanceSums<kKeys, kRows>(strip).add_to(table_gradients(p, work.head), corner, reach);
}

// One warp of a warpgroup of its own: the sums by bucket. Waits for work_full and g_full.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void add_up_times(const BackwardParams& p,
                                             const BackwardShared<kHeadDim, Mask, Config>& shared, int warp) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Strip = GradientStrip<T, typename Shared::GTile, Config::rows>;
    constexpr int kRows = Config::rows, kKeys = Strip::kKeys;
    fill(shared.time_tables(), threadIdx.x % kWarpgroup, kWarpgroup);
    named_sync(2, kWarpgroup);
    if (warp >= Config::cols / kKeys) return;
    const bool wanted = p.dtime != nullptr;
    QueryTimes<kRows> queries(shared.query_order(warp));
    RingPosition<Config::g_stages> g;
    for (RingPosition<2> k;; k.next()) {
        shared.work_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        const int tiles = work.walk.tiles, col = work.col0 + warp * kKeys;
        const RelativeBias<float> bias = bias_of(p, work);
        BucketSums sums;
        int64_t key_time = 0;
        if (wanted && tiles > 0) {
            queries.load(bias, work.walk[0]);
            key_time = __ldg(bias.key_times + min_of(col + lane(), bias.len_k - 1));
        }
#pragma unroll 1
        for (int t = 0; t < tiles; ++t, g.next()) {
            const int row = work.walk[t];
            const bool needed = wanted && keeps_any(work.mask, row, kRows, col, kKeys);
            TimeSums<kRows> times{shared.time_tables(), queries, shared.sums(warp), key_time};
            if (wanted) {
                if (needed) {
                    queries.take();
                    times.find_buckets(bias.num_buckets);
                }
                queries.load(bias, t + 1 < tiles ? work.walk[t + 1] : row);
            }
            shared.g_full(g.stage).wait(g.phase);
            if (needed) times.start(sums, Strip{shared.g(g.stage), warp * kKeys, 0});
            arrive_as_warp(shared.g_empty(g.stage));
            if (needed)
                times.finish(
                    sums, queries.ordered ? masked_rows(work.mask, min_of(col + lane(), work.mask.len_k - 1), row) : 0);
            __syncwarp();
        }
        if (wanted && tiles > 0) sums.flush(table_gradients(p, work.head), bias.num_buckets);
        arrive_as_warp(shared.k_empty(k.stage));
    }
}

}  // namespace hstu::attention::sm90
