// The warpgroup of the SM90 backward that serves the relative bias: it writes the bias of a tile of S^T for the key
// warpgroups one tile ahead of them, and adds up the tables' gradients from the G^T that they hand out.
#pragma once

#include "attention/sm90/relative_gradient.h"

namespace hstu::attention::sm90 {

// Half the bias of 16 keys x kQueries queries, in the order of the accumulators of S^T.
template <int kQueries>
__device__ __forceinline__ void write_half_bias(float4* to, const RelativeBias<float>& bias, int row, int col) {
#pragma unroll 1
    for (int n = 0; n < kQueries / 8; ++n) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int query = min_of(row + 8 * n + lane() % 4 * 2 + i % 2, bias.len_q - 1);
            const int key = min_of(col + lane() / 4 + i / 2 * 8, bias.len_k - 1);
            x[i] = bias.position != nullptr ? __ldg(bias.position + bias.distance(query, key)) : 0.0f;
            if (bias.time == nullptr) continue;
            const uint64_t apart = time_difference(__ldg(bias.query_times + query), __ldg(bias.key_times + key));
            x[i] += __ldg(bias.time + min_of(sm80::bucket_of(apart), bias.num_buckets));
        }
        to[n * 32 + lane()] = float4{0.5f * x[0], 0.5f * x[1], 0.5f * x[2], 0.5f * x[3]};
    }
}

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
    // Of `half` of the keys, 16 each, at query block 0 of this warp.
    __device__ __forceinline__ float4* bias_strip(int stage, int half) const {
        const int strip = warp % kWarpsM * 2 + half;
        return reinterpret_cast<float4*>(shared.bias(stage)) + (strip * (Config::rows / 8) + warp / kWarpsM * (kQueries / 8)) * 32;
    }

    // The bias of tile t. Its stage is free: this warp has read the G^T of the tile that was there before.
    __device__ __forceinline__ void write_bias(const KeyWork<Mask>& work, int t, int stage) const {
        const int row = first_query(work, t), col = first_key(work);
        const bool needed = keeps_any(work, row, col);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            float4* const to = bias_strip(stage, half);
            if (needed) {
                write_half_bias<kQueries>(to, bias_of(work), row, col + 16 * half);
            } else {
                for (int n = 0; n < kQueries / 8; ++n) to[n * 32 + lane()] = float4{0.0f, 0.0f, 0.0f, 0.0f};
            }
        }
        arrive_as_warp(shared.bias_full(stage));
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
        if (p.dtime != nullptr)
            add_times<T, kQueries>(sums, strip, queries, key_time, reinterpret_cast<float*>(bias_strip(g.stage, 0)),
                                   work.mask, bias.num_buckets, row, col);
        __syncwarp();
    }
    __device__ __forceinline__ TableGradients gradients(int head) const {
        TableGradients to(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
        to.scale *= 0.5f;  // G^T is handed out twice as large
        return to;
    }
};

// Warp `warp` of four. Waits for k_full and g_full.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void serve_bias(const BackwardParams& p, const BackwardShared<kHeadDim, Mask, Config>& shared,
                                           int warp) {
    const BiasWarp<T, kHeadDim, Mask, Config> own{p, shared, warp};
    RingPosition<Config::g_stages> ahead, g;
    bool begun = false;  // the first tile's bias is there
    for (RingPosition<Config::works> k;;) {
        shared.k_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        const int tiles = work.walk.tiles;
        RingPosition<Config::works> next = k;
        next.next();
        TableSums sums;
        const auto write = [&](const KeyWork<Mask>& of, int t) {
            own.write_bias(of, t, ahead.stage);
            ahead.next();
        };
        if (!begun && tiles > 0) write(work, 0);
        begun = false;
#pragma unroll 1
        for (int t = 0; t < tiles; ++t, g.next()) {
            if (t + 1 < tiles) {
                write(work, t + 1);
            } else if (Config::works > 1) {
                shared.k_full(next.stage).wait(next.phase);
                const KeyWork<Mask>& after = shared.work(next.stage);
                begun = !after.last && after.walk.tiles > 0;
                if (begun) write(after, 0);
            }
            own.add_gradients(sums, work, t, g);
        }
        if (tiles > 0) sums.flush(own.gradients(work.head), p.relative.num_buckets);
        arrive_as_warp(shared.k_empty(k.stage));
        k = next;
    }
}

}  // namespace hstu::attention::sm90
