// The key warpgroups of the SM90 backward at head dimension 256, where dK and dV of 64 keys fill a warpgroup's registers
// each. Both own the same 64 keys: one computes S, P and dV and hands the slopes silu'(S) through shared memory to the
// other, which computes dP, G and dK.
#pragma once

#include <cstring>

#include "attention/sm90/backward_kv.h"

namespace hstu::attention::sm90 {

// dK or dV of 64 keys in two halves: one instruction cannot have all of a thread's registers.
template <int kHeadDim>
struct HalvedSum {
    Accumulator<kHeadDim / 2> low, high;

    __device__ __forceinline__ void clear() {
        low.clear();
        high.clear();
    }
    template <class T, int kSteps, class Tile>
    __device__ __forceinline__ void start(const Fragments<kSteps>& left, Tile right) {
        begin_products();
        multiply<T, kSteps>(low, left, columns(right));
        multiply<T, kSteps>(high, left, columns(right, kHeadDim / 2));
        commit_products();
    }
    __device__ __forceinline__ void finish() {
        wait_products<0>();
        hold(low);
        hold(high);
    }
    template <class T>
    __device__ __forceinline__ void store(float factor, T* to, int64_t stride, int num_rows, int num_cols) const {
        store_product(low, factor, to, stride, num_rows, num_cols);
        store_product(high, factor, to + kHeadDim / 2, stride, num_rows, num_cols - kHeadDim / 2);
    }
};

// Through the tile where G will be, as G is stored there: a warp reads what a warp of the other warpgroup wrote.
template <int kRows, class Tile>
__device__ __forceinline__ void put_slopes(const Slopes<kRows>& slopes, Tile tile) {
    Fragments<kRows / 16> words;
    std::memcpy(words.x, slopes.x, sizeof words.x);
    store_fragments(words, tile, threadIdx.x / 32 % 4 * 16);
}
template <int kRows, class Tile>
__device__ __forceinline__ void take_slopes(Slopes<kRows>& slopes, Tile tile) {
    Fragments<kRows / 16> words;
    load_fragments(words, tile, threadIdx.x / 32 % 4 * 16);
    std::memcpy(slopes.x, words.x, sizeof words.x);
    __syncwarp();
}

// S, P and dV. Waits for k_full, q_full and g_empty.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void own_values(const BackwardParams& p,
                                           const BackwardShared<kHeadDim, Mask, Config>& shared) {
    constexpr int kRows = Config::rows;
    RingPosition<Config::stages> q;
    RingPosition<Config::g_stages> g;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        if (shared.work(k.stage).last) break;
        const int tiles = __shfl_sync(0xffffffff, shared.work(k.stage).walk.tiles, 0);
        const auto keys = rows(shared.k(k.stage));
        HalvedSum<kHeadDim> dv;
        Accumulator<kRows> s;
        Fragments<kRows / 16> weights;
        Slopes<kRows> slopes;
        dv.clear();
        for (int t = 0; t < tiles; ++t, q.next()) {
            shared.q_full(q.stage).wait(q.phase);
            begin_products();
            multiply<T, kHeadDim / 16, true>(s, keys, rows(shared.q(q.stage)));
            commit_products();
            wait_products<0>();
            hold(s);
            const int row0 = shared.work(k.stage).walk[t], col0 = shared.work(k.stage).col0;
            const Mask mask = shared.work(k.stage).mask;
            float half_alpha = 0.5f * p.alpha;
            if constexpr (Config::relative) {
                add_half_bias(s, shared.bias(), q.stage, threadIdx.x / 32 % 4, half_alpha);
                half_alpha = 1.0f;
            }
            if (mask.is_full(row0, kRows, col0, Config::cols))
                activate<T, false>(s, weights, slopes, mask, row0, col0, half_alpha);
            else
                activate<T, true>(s, weights, slopes, mask, row0, col0, half_alpha);
            hold(weights);
            dv.template start<T>(weights, shared.dout(q.stage));
            shared.g_empty(g.stage).wait(g.phase ^ 1);
            put_slopes(slopes, shared.g(g.stage));
            arrive_as_warp(shared.slopes_full(g.stage));
            g.next();
            dv.finish();
            hold(weights);
            arrive_in_cluster<Config::cluster>(shared.q_empty(q.stage));
        }
        const int head = shared.work(k.stage).head, col0 = shared.work(k.stage).col0;
        const int num_rows = shared.work(k.stage).mask.len_k - col0;
        const int64_t packed_key = int64_t{shared.work(k.stage).k_begin} + col0;
        arrive_as_warp(shared.k_empty(k.stage));
        dv.store(p.inv_scaling, p.dv.at<T>(packed_key, head), p.dv.row_stride, num_rows, p.dim_v);
    }
}

// dP, G and dK. Waits for k_full, v_full, q_full and slopes_full.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void own_gradients(const BackwardParams& p,
                                              const BackwardShared<kHeadDim, Mask, Config>& shared) {
    constexpr int kRows = Config::rows;
    using Bias = typename BackwardShared<kHeadDim, Mask, Config>::Bias;
    using Relative = std::conditional_t<Config::relative, KeySums<Bias>, NoKeySums>;
    RingPosition<Config::stages> q;
    RingPosition<Config::g_stages> g;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        if (shared.work(k.stage).last) break;
        const int tiles = __shfl_sync(0xffffffff, shared.work(k.stage).walk.tiles, 0);
        [[maybe_unused]] Relative relative(shared.bias(), threadIdx.x / 32 % 4, p, shared.work(k.stage).head);
        const auto values = rows(shared.v(k.stage));
        HalvedSum<kHeadDim> dk;
        Accumulator<kRows> dp;
        Fragments<kRows / 16> gradients;
        Slopes<kRows> slopes;
        dk.clear();
        shared.v_full(k.stage).wait(k.phase);
        for (int t = 0; t < tiles; ++t, q.next(), g.next()) {
            shared.q_full(q.stage).wait(q.phase);
            begin_products();
            multiply<T, kHeadDim / 16, true>(dp, values, rows(shared.dout(q.stage)));
            commit_products();
            shared.slopes_full(g.stage).wait(g.phase);
            take_slopes(slopes, shared.g(g.stage));
            wait_products<0>();
            hold(dp);
            if (t == tiles - 1) arrive_as_warp(shared.v_empty(k.stage));
            apply_slopes<T>(dp, slopes, gradients);
            hand_out_gradients(gradients, shared, g.stage, threadIdx.x / 32 % 4 * 16);
            hold(gradients);
            dk.template start<T>(gradients, shared.q(q.stage));
            if constexpr (Config::relative) relative.add(dp, p, corner_of(shared.work(k.stage), t, relative.strip));
            dk.finish();
            hold(gradients);
            arrive_in_cluster<Config::cluster>(shared.q_empty(q.stage));
        }
        if (tiles == 0) arrive_as_warp(shared.v_empty(k.stage));
        const int head = shared.work(k.stage).head, col0 = shared.work(k.stage).col0;
        const int num_rows = shared.work(k.stage).mask.len_k - col0;
        const int64_t packed_key = int64_t{shared.work(k.stage).k_begin} + col0;
        if constexpr (Config::relative) relative.finish(p);
        arrive_as_warp(shared.k_empty(k.stage));
        dk.store(0.5f * p.alpha * p.inv_scaling, p.dk.at<T>(packed_key, head), p.dk.row_stride, num_rows, p.dim_qk);
    }
}

}  // namespace hstu::attention::sm90
