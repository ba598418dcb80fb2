// The warpgroup of the SM90 backward that serves the relative bias: it writes the bias of a tile of S^T for the key
// warpgroups one tile ahead of them, and adds up the tables' gradients from the G^T that they hand out.
#pragma once

#include "attention/sm90/relative_gradient.h"

namespace hstu::attention::sm90 {

// A warp of the bias warpgroup: its kKeys keys and kQueries queries of each tile.
template <class T, int kHeadDim, class Mask, class Config>
struct BiasWarp {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    static constexpr int kKeys = 32, kWarpsM = Config::cols / kKeys, kQueries = Config::rows * kWarpsM / 4;

    const BackwardParams& p;
    const Shared& shared;
    const int warp;  // 0 to 3

    __device__ __forceinline__ int first_key(const KeyWork<Mask>& work) const {
        return work.col0 + warp % kWarpsM * kKeys;
    }
    __device__ __forceinline__ int first_query(const KeyWork<Mask>& work, int t) const {
        return work.walk[t] + warp / kWarpsM * kQueries;
    }
    __device__ __forceinline__ RelativeBias<float> bias_of(const KeyWork<Mask>& work) const {
        return RelativeBias<float>(p, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k, work.head);
    }
    __device__ __forceinline__ bool keeps_any(const KeyWork<Mask>& work, int row, int col) const {
        return col < work.mask.len_k && overlaps(work.mask.q_range(col, kKeys), row, kQueries);
    }
    // The sums of tile t. Waits for g_full: the key warpgroups have then read its bias, whose place serves as scratch.
    __device__ __forceinline__ void add_gradients(TableSums& sums, const KeyWork<Mask>& work, int t,
                                                  RingPosition<Config::g_stages> g) const {
        const int row = first_query(work, t), col = first_key(work);
        const RelativeBias<float> bias = bias_of(work);
        const bool needed = keeps_any(work, row, col);
        GradientStrip<T, kQueries> strip;
        QueryTimes<kQueries> queries(shared.template query_order<kQueries>(warp));
        int64_t key_time = 0;
        if (needed && p.dtime != nullptr) {
            queries.load(bias, row);
            key_time = __ldg(bias.key_times + min_of(col + lane(), bias.len_k - 1));
        }
        shared.g_full(g.stage).wait(g.phase);
        if (needed) strip.load(shared.g(g.stage), col - work.col0, row - work.walk[t]);
        arrive_as_warp(shared.g_empty(g.stage));
        if (!needed) return;
        if (p.dposition != nullptr) {
            const int corner = row + bias.offset - col;
            const bool above = corner - (kKeys - 1) >= bias.reach, below = corner + kQueries - 1 <= -bias.reach;
            const TableGradients to = gradients(work.head);
            if (above || below)
                sums.add_to_clipped(above ? bias.reach : -bias.reach, strip.sum(), to);
            else
                add_distances<T, kQueries>(strip, to, corner, bias.reach);
        }
        if (p.dtime != nullptr) {
            float* const scratch = reinterpret_cast<float*>(shared.bias(g.stage) + warp % kWarpsM * 2 * Shared::kStrip);
            add_times<T, kQueries>(sums, strip, queries, key_time, scratch + warp / kWarpsM * (16 * kQueries), work.mask,
                                   bias.num_buckets, row, col);
        }
        __syncwarp();
    }
    __device__ __forceinline__ TableGradients gradients(int head) const {
        TableGradients to(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
        to.scale *= 0.5f;  // G^T is handed out twice as large
        return to;
    }
};

// The bias of tiles, one work after another.
template <class Mask, class Config>
struct BiasAhead {
    using Bias = BiasWarps<BiasShared<Config::cols / 64, Config::rows>, true>;
    Bias bias;
    RingPosition<Config::g_stages> at;

    // The queries that need the 16 keys from `key` on. A full tile tests no mask, so what lies past the ends of a sequence
    // is written too: silu of what was there before would do for finite numbers only.
    static __device__ __forceinline__ Spans wanted(const Mask& mask, int key) {
        constexpr int kAll = 1 << 30;
        if (key >= mask.len_k) return {{0, kAll}, {}};
        Spans rows = mask.q_range(key, 16);
        if (rows.first.end >= mask.len_q) rows.first.end = kAll;
        if (rows.second.end >= mask.len_q) rows.second.end = kAll;
        return rows;
    }
    static __device__ __forceinline__ RelativeSides<true> sides(const BackwardParams& p, const KeyWork<Mask>& work) {
        return {p.relative, work.head, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k};
    }
    // Tile t of a work, after t - 1. Its stage is free: this warpgroup has read the G^T of the tile that was there before.
    template <class Shared>
    __device__ __forceinline__ void write(const BackwardParams& p, const Shared& shared, const KeyWork<Mask>& work, int t) {
        if (t == 0) {
            const int key = Bias::first_row(work.col0, Bias::group_of_lane());
            bias.begin_block(sides(p, work), work.col0, wanted(work.mask, key), work.walk[0]);
        }
        bias.begin_tile(work.walk[t], work.walk[t + 1]);
#pragma unroll 1
        for (int group = 0; group < Config::cols / 64; ++group) {
            float4* const to = shared.bias(at.stage) + (group * 4 + threadIdx.x / 32 % 4) * Shared::kStrip;
#pragma unroll 1
            for (int piece = 0; piece < Bias::kPieces; ++piece) bias.write(group, piece, to + piece * (kPieceCols / 8 * 32));
        }
        arrive_as_warp(shared.bias_full(at.stage));
        at.next();
    }
};

// Warp `warp` of four. Waits for k_full and g_full.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void serve_bias(const BackwardParams& p, const BackwardShared<kHeadDim, Mask, Config>& shared,
                                           int warp) {
    const BiasWarp<T, kHeadDim, Mask, Config> own{p, shared, warp};
    shared.k_full(0).wait(0);
    if (shared.work(0).last) return;
    using Ahead = BiasAhead<Mask, Config>;
    Ahead ahead{{shared.bias_tables(), Ahead::sides(p, shared.work(0)), 1}, {}};
    RingPosition<Config::g_stages> g;
    bool begun = false;  // the first tile's bias is there
    for (RingPosition<Config::works> k;;) {
        shared.k_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        const int tiles = work.walk.tiles;
        RingPosition<Config::works> next = k;
        next.next();
        TableSums sums;
        if (!begun && tiles > 0) ahead.write(p, shared, work, 0);
        begun = false;
#pragma unroll 1
        for (int t = 0; t < tiles; ++t, g.next()) {
            // The next tile's bias: of this work or, where its keys are in shared memory too, of the next one.
            const bool last = t + 1 == tiles;
            if (Config::works > 1 && last) {
                shared.k_full(next.stage).wait(next.phase);
                begun = !shared.work(next.stage).last && shared.work(next.stage).walk.tiles > 0;
            }
            if (!last || begun) ahead.write(p, shared, shared.work(last ? next.stage : k.stage), last ? 0 : t + 1);
            own.add_gradients(sums, work, t, g);
        }
        if (tiles > 0) sums.flush(own.gradients(work.head), p.relative.num_buckets);
        arrive_as_warp(shared.k_empty(k.stage));
        k = next;
    }
}

}  // namespace hstu::attention::sm90
