// The warpgroup of the SM90 backward that adds up dQ.
//
// The blocks that own keys of one (sequence, head) take turns at a tile of dQ, the last keys first, which is the order in
// which blocks that start together pass by under a causal mask: the first one stores its product in fp32 scratch, the
// last one reads the sum, adds its own and writes dQ. Those between read, add and store in the same order (deterministic),
// or wait for the first one alone and add by reduction. A tile that one block alone sees never goes through scratch.
// Waiting for a turn and passing it on take a round trip to the L2 cache each, so two threads beside the warpgroup do it.
#pragma once

#include "attention/sm90/backward_kv.h"
#include "attention/sm90/plan.h"

namespace hstu::attention::sm90 {

// BackwardParams::dq_accum.
template <int kHeadDim, class Config>
struct DqScratch {
    static constexpr int kTile = Config::rows * kHeadDim / Config::cluster;  // a block's part of a tile
    float* sums;

    HSTU_HOST_DEVICE int* turns(const BackwardParams& p) const {
        return reinterpret_cast<int*>(sums + dq_tiles<Config>(p) * Config::cluster * kTile);
    }
};

// One work's visit to one tile of dQ, of which each block of the cluster adds up its columns.
template <int kHeadDim, class Mask, class Config>
struct Visit {
    int rank, count;  // the visit's place among `count`
    int64_t tile;

    __device__ __forceinline__ Visit(const BackwardParams& p, const KeyWork<Mask>& work, int row0) {
        const KeyTileRank order(work.mask, row0, Config::rows, work.cluster_col0, Config::cluster * Config::cols);
        count = order.count, rank = count - 1 - order.rank;
        tile = (int64_t{work.dq_tile + row0 / Config::rows} * p.heads + work.head) * Config::cluster +
               blockIdx.x % Config::cluster;
    }
    __device__ __forceinline__ bool first() const { return rank == 0; }
    __device__ __forceinline__ bool last() const { return rank == count - 1; }
};

// One thread: says when a work's turn at a tile has come, ahead of time. Waits for the blocks before this one and for
// turn_taken.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void await_turns(const BackwardParams& p,
                                            const BackwardShared<kHeadDim, Mask, Config>& shared) {
    const int* const turns = DqScratch<kHeadDim, Config>{p.dq_accum}.turns(p);
    RingPosition<2> turn;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        const KeyWork<Mask>& work = shared.work(k.stage);
        if (work.last) break;
        for (int t = 0; t < work.walk.tiles; ++t) {
            const Visit<kHeadDim, Mask, Config> visit(p, work, work.walk[t]);
            if (visit.first()) continue;
            shared.turn_taken(turn.stage).wait(turn.phase ^ 1);
            await_counter(turns + visit.tile, p.deterministic || visit.last() ? visit.rank : 1);
            shared.turn_came(turn.stage).arrive();
            turn.next();
        }
        shared.k_empty(k.stage).arrive();
    }
}

// One thread: passes a turn on once the sums are visible to all. Waits for turn_over.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void pass_turns(const BackwardParams& p,
                                           const BackwardShared<kHeadDim, Mask, Config>& shared) {
    int* const turns = DqScratch<kHeadDim, Config>{p.dq_accum}.turns(p);
    RingPosition<2> turn;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        const KeyWork<Mask> work = shared.work(k.stage);
        shared.k_empty(k.stage).arrive();
        if (work.last) break;
        for (int t = 0; t < work.walk.tiles; ++t) {
            const Visit<kHeadDim, Mask, Config> visit(p, work, work.walk[t]);
            if (visit.last()) continue;
            shared.turn_over(turn.stage).wait(turn.phase);
            raise_counter(turns + visit.tile);
            shared.turn_passed(turn.stage).arrive();
            turn.next();
        }
    }
}

// Slot i of a product is 16 bytes a thread, contiguous over the warpgroup. load_sums adds what it loads.
template <int kCols>
__device__ __forceinline__ void load_sums(Accumulator<kCols>& acc, const float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) {
        const float4 x = __ldcg(slots + i * kWarpgroup);
        acc.x[4 * i] += x.x, acc.x[4 * i + 1] += x.y, acc.x[4 * i + 2] += x.z, acc.x[4 * i + 3] += x.w;
    }
}
template <int kCols>
__device__ __forceinline__ float4 slot_of(const Accumulator<kCols>& acc, int i) {
    return {acc.x[4 * i], acc.x[4 * i + 1], acc.x[4 * i + 2], acc.x[4 * i + 3]};
}
template <int kCols>
__device__ __forceinline__ void store_sums(const Accumulator<kCols>& acc, float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) __stcg(slots + i * kWarpgroup, slot_of(acc, i));
}
template <int kCols>
__device__ __forceinline__ void add_sums(const Accumulator<kCols>& acc, float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) add_to_global(slots + i * kWarpgroup, slot_of(acc, i));
}

// One warpgroup: dQ of a work's query tiles, a unit of 64 rows and unit_cols columns after another. Waits for k_full,
// v_full, g_full, turn_came and turn_passed.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void add_up_queries(const BackwardParams& p,
                                               const BackwardShared<kHeadDim, Mask, Config>& shared) {
    constexpr int kRows = Config::rows, kUnitCols = Config::unit_cols, kCluster = Config::cluster;
    constexpr int kUnitsN = kHeadDim / kCluster / kUnitCols, kUnits = kRows / 64 * kUnitsN;
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Scratch = DqScratch<kHeadDim, Config>;
    constexpr bool kAhead = kCluster > 1;  // single blocks lose more by the waiting than they gain
    const int first_col = blockIdx.x % kCluster * (kHeadDim / kCluster);
    RingPosition<Config::g_stages> g;
    RingPosition<2> came, over;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        const KeyWork<Mask> work = shared.work(k.stage);
        if (work.last) break;
        shared.v_full(k.stage).wait(k.phase);
        for (int t = 0; t < work.walk.tiles; ++t, g.next()) {
            const int row0 = work.walk[t];
            const Visit<kHeadDim, Mask, Config> visit(p, work, row0);
            float4* const slots =
                reinterpret_cast<float4*>(p.dq_accum + visit.tile * Scratch::kTile) + threadIdx.x % kWarpgroup;
            const bool reduced = !p.deterministic && !visit.first() && !visit.last();
            const bool ahead = kAhead && !visit.first() && !reduced;
            const auto await_turn = [&] {
                shared.turn_came(came.stage).wait(came.phase);
                arrive_as_warp(shared.turn_taken(came.stage));
                came.next();
            };
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                const int unit_row = unit / kUnitsN * 64, unit_col = unit % kUnitsN * kUnitCols + first_col;
                float4* const unit_slots = slots + unit * (64 * kUnitCols / 4);
                Accumulator<kUnitCols> dq;
                dq.clear();
                if (ahead) {  // the sums come before G does
                    if (unit == 0) await_turn();
                    load_sums(dq, unit_slots);
                }
                if (unit == 0) shared.g_full(g.stage).wait(g.phase);
                begin_products();
                multiply<T, Config::cols / 16>(dq, columns(shared.g(g.stage), unit_row),
                                               columns(shared.k(k.stage), unit_col));
                if constexpr (kCluster == 2)
                    multiply<T, Config::cols / 16>(
                        dq, columns(shared.other_g(g.stage), unit_row),
                        columns(shared.other_k(k.stage), unit_col % Shared::OtherKTile::kDim));
                commit_products();
                wait_products<0>();
                hold(dq);
                if (unit == kUnits - 1) {
                    arrive_in_cluster<kCluster>(shared.g_empty(g.stage));
                    if (t == work.walk.tiles - 1 && lane() == 0) shared.k_empty(k.stage).arrive();
                }
                if (!ahead && !visit.first()) {
                    if (unit == 0) await_turn();
                    if (!reduced) load_sums(dq, unit_slots);
                }
                if (visit.last()) {
                    const int row = row0 + unit_row;
                    T* const to = p.dq.at<T>(work.q_begin + int64_t{row}, work.head) + unit_col;
                    store_product(dq, 0.5f * p.alpha * p.inv_scaling, to, p.dq.row_stride, work.mask.len_q - row,
                                  p.dim_qk - unit_col);
                } else if (reduced) {
                    add_sums(dq, unit_slots);
                } else {
                    store_sums(dq, unit_slots);
                }
            }
            if (!visit.last()) {
                shared.turn_passed(over.stage).wait(over.phase ^ 1);
                arrive_as_warp(shared.turn_over(over.stage));
                over.next();
            }
        }
        __syncwarp();
        if (work.walk.tiles == 0 && lane() == 0) shared.k_empty(k.stage).arrive();
    }
}

}  // namespace hstu::attention::sm90
