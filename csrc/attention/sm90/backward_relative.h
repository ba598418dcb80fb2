// The warpgroup of the SM90 backward that serves the relative bias. Two warps write the bias of tiles of S^T for the key
// warpgroups, up to g_stages tiles ahead of the sums; two add up the tables' gradients from the G^T that the key warpgroups
// hand out. A tile's G^T comes after its bias has been read, so the place of that one serves as scratch for the sums.
#pragma once

#include "attention/sm90/relative_gradient.h"

namespace hstu::attention::sm90 {

// One of two warps. Waits for work_full and bias_empty.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void write_biases(const BackwardParams& p,
                                             const BackwardShared<kHeadDim, Mask, Config>& shared) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Bias = BiasWarps<typename Shared::BiasTables, true, 2>;
    constexpr int kGroups = Config::cols / 32, kParts = kGroups * Bias::kPieces, kAll = 1 << 30;
    const auto sides_of = [&](const KeyWork<Mask>& work) {
        return RelativeSides<true>(p.relative, work.head, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k);
    };
    // The queries that need the 16 keys from `key` on. A full tile tests no mask, so what lies past the ends of a sequence
    // is written too: silu of what was there before would do for finite numbers only.
    const auto wanted = [&](const Mask& mask, int key) -> Spans {
        if (key >= mask.len_k) return {{0, kAll}, {}};
        Spans rows = mask.q_range(key, 16);
        if (rows.first.end >= mask.len_q) rows.first.end = kAll;
        if (rows.second.end >= mask.len_q) rows.second.end = kAll;
        return rows;
    };
    shared.work_full(0).wait(0);
    if (shared.work(0).last) return;
    Bias bias(shared.bias_tables(), sides_of(shared.work(0)), 1);
    RingPosition<Config::g_stages> at;
    for (RingPosition<2> k;; k.next()) {
        shared.work_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        const int tiles = work.walk.tiles;
        if (tiles > 0) {
            bias.begin_block(sides_of(work), work.col0, wanted(work.mask, Bias::first_row(work.col0, Bias::group_of_lane())),
                             work.walk[0]);
        }
#pragma unroll 1
        for (int t = 0; t < tiles; ++t, at.next()) {
            bias.begin_tile(work.walk[t], work.walk[t + 1]);
            float4* const to = shared.bias(at.stage) + threadIdx.x / 32 % 2 * Shared::kStrip;
            shared.bias_empty(at.stage).wait(at.phase ^ 1);
#pragma unroll 1
            for (int part = 0; part < kParts; ++part) {
                bias.write(part / Bias::kPieces, part % Bias::kPieces, to + part / Bias::kPieces * 2 * Shared::kStrip + part % Bias::kPieces * (kPieceCols / 8 * 32));
            }
            arrive_as_warp(shared.bias_full(at.stage));
        }
        arrive_as_warp(shared.k_empty(k.stage));
    }
}

// One of two warps, which has half of the keys. Waits for work_full and g_full.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void add_up_tables(const BackwardParams& p,
                                              const BackwardShared<kHeadDim, Mask, Config>& shared, int warp) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Strip = GradientStrip<T, typename Shared::GTile, Config::rows>;
    constexpr int kRows = Config::rows, kKeys = Strip::kKeys, kStrips = Config::cols / 2 / kKeys;
    fill(shared.time_tables(), threadIdx.x % 64, 64);
    named_sync(2, 64);
    const bool of_times = p.dtime != nullptr, of_positions = p.dposition != nullptr;
    const int reach = p.relative.reach;
    QueryTimes<kRows> queries(shared.query_order(warp));
    RingPosition<Config::g_stages> g;
    for (RingPosition<2> k;; k.next()) {
        shared.work_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        const int tiles = work.walk.tiles, first_key = work.col0 + warp * (Config::cols / 2);
        const RelativeBias<float> bias(p, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k, work.head);
        TableGradients to(p, work.head, static_cast<int>(blockIdx.x) % kTableCopies);
        to.scale *= 0.5f;  // G^T is handed out twice as large
        TableSums sums;
        int64_t key_times[kStrips] = {};
        if (of_times && tiles > 0) {
            queries.load(bias, work.walk[0]);
#pragma unroll
            for (int i = 0; i < kStrips; ++i)
                key_times[i] = __ldg(bias.key_times + min_of(first_key + i * kKeys + lane(), bias.len_k - 1));
        }
#pragma unroll 1
        for (int t = 0; t < tiles; ++t, g.next()) {
            const int row = work.walk[t];
            if (of_times) {
                queries.take();
                queries.load(bias, work.walk[t + 1]);
            }
            shared.g_full(g.stage).wait(g.phase);
#pragma unroll 1
            for (int i = 0; i < kStrips; ++i) {
                const int col = first_key + i * kKeys;
                if (col >= work.mask.len_k || !overlaps(work.mask.q_range(col, kKeys), row, kRows)) continue;
                const Strip strip{shared.g(g.stage), col - work.col0, 0};
                if (of_positions) {
                    const int corner = row + bias.offset - col;
                    const bool above = corner - (kKeys - 1) >= reach, below = corner + kRows - 1 <= -reach;
                    if (above || below)
                        sums.add_to_clipped(above ? reach : -reach, strip.sum(), to);
                    else
                        DistanceSums<kKeys, kRows>(strip).add_to(to, corner, reach);
                }
                if (of_times) {
                    float* const scratch = reinterpret_cast<float*>(shared.bias(g.stage)) + (col - work.col0) * kRows;
                    TimeSums<kRows> times{shared.time_tables(), queries, scratch, i == 0 ? key_times[0] : key_times[kStrips - 1]};
                    times.find_buckets(bias.num_buckets);
                    times.start(sums, strip);
                    times.finish(sums, queries.ordered ? masked_rows(work.mask, min_of(col + lane(), work.mask.len_k - 1), row) : 0);
                }
                __syncwarp();
            }
            arrive_as_warp(shared.g_empty(g.stage));
            arrive_as_warp(shared.bias_empty(g.stage));
        }
        if (tiles > 0) sums.flush(to, bias.num_buckets);
        arrive_as_warp(shared.k_empty(k.stage));
    }
}

// Warp `warp` of the warpgroup.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void serve_bias(const BackwardParams& p, const BackwardShared<kHeadDim, Mask, Config>& shared,
                                           int warp) {
    if (warp < 2)
        write_biases<T>(p, shared);
    else
        add_up_tables<T>(p, shared, warp - 2);
}

}  // namespace hstu::attention::sm90
