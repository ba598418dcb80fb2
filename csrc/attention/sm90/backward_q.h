// The warpgroup of the SM90 backward that adds up dQ.
//
// The blocks that own keys of one (sequence, head) take turns at a tile of dQ, in the order of their keys: the first
// stores its product in fp32 scratch, the last one reads the sum, adds its own and writes dQ. Those between read, add
// and store in the same order (deterministic), or add by reduction in any order. A tile that one block alone sees never
// goes through scratch. The turns of each of the four warps are counted on their own: a warp's fragments lie in scratch
// as they lie in its registers, so it needs nothing of the other warps.
#pragma once

#include "attention/sm90/backward_kv.h"
#include "attention/sm90/plan.h"

namespace hstu::attention::sm90 {

// BackwardParams::dq_accum.
template <int kHeadDim, class Config>
struct DqScratch {
    static constexpr int kTile = Config::rows * kHeadDim;
    float* sums;

    HSTU_HOST_DEVICE int* turns(const BackwardParams& p) const {
        return reinterpret_cast<int*>(sums + dq_tiles<Config>(p) * kTile);
    }
};

__device__ __forceinline__ void wait_for_turn(const int* turn, int wanted) {
    int done;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(turn) : "memory");
    } while (done < wanted);
}
__device__ __forceinline__ void end_turn(int* turn) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

// Slot i of a product is 16 bytes a thread, contiguous over the warpgroup.
template <int kCols>
__device__ __forceinline__ void load_sums(Accumulator<kCols>& acc, const float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) {
        const float4 x = __ldcg(slots + i * kWarpgroup);
        acc.x[4 * i] = x.x, acc.x[4 * i + 1] = x.y, acc.x[4 * i + 2] = x.z, acc.x[4 * i + 3] = x.w;
    }
}
template <int kCols>
__device__ __forceinline__ void store_sums(const Accumulator<kCols>& acc, float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i)
        __stcg(slots + i * kWarpgroup, float4{acc.x[4 * i], acc.x[4 * i + 1], acc.x[4 * i + 2], acc.x[4 * i + 3]});
}
template <int kCols>
__device__ __forceinline__ void add_sums(const Accumulator<kCols>& acc, float4* slots) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(slots + i * kWarpgroup),
                     "f"(acc.x[4 * i]), "f"(acc.x[4 * i + 1]), "f"(acc.x[4 * i + 2]), "f"(acc.x[4 * i + 3])
                     : "memory");
}

// One warpgroup: dQ of a work's query tiles, a unit of 64 rows and at most 64 columns after another. Waits for k_full,
// g_full and the blocks before this one.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void add_up_queries(const BackwardParams& p,
                                               const BackwardShared<kHeadDim, Mask, Config>& shared) {
    constexpr int kRows = Config::rows, kUnitCols = min_of(64, kHeadDim);
    constexpr int kUnitsN = kHeadDim / kUnitCols, kUnits = kRows / 64 * kUnitsN;
    using Scratch = DqScratch<kHeadDim, Config>;
    const Scratch scratch{p.dq_accum};
    const bool signals = threadIdx.x % kWarpgroup == 0;
    const float factor = 0.5f * p.alpha * p.inv_scaling;
    RingPosition<2> g;
    for (RingPosition<1> k;; k.next()) {
        shared.k_full().wait(k.phase);
        if (shared.work().last) break;
        const Mask mask = shared.work().mask;
        const TileWalk walk = shared.work().walk;
        const int head = shared.work().head, col0 = shared.work().col0, dq_tile = shared.work().dq_tile;
        const int q_begin = shared.work().q_begin;
        for (int t = 0; t < walk.tiles; ++t) {
            const int row0 = walk[t];
            const DqOrder order = DqOrder::of(mask, row0, kRows, col0, Config::cols);
            const bool first = order.rank == 0, last = order.rank == order.count - 1;
            const bool in_order = p.deterministic || last;
            const int64_t tile = int64_t{dq_tile + row0 / kRows} * p.heads + head;
            float4* const slots =
                reinterpret_cast<float4*>(scratch.sums + tile * Scratch::kTile) + threadIdx.x % kWarpgroup;
            int* const turn = scratch.turns(p) + tile * 4 + threadIdx.x / 32 % 4;
            if (!first) {
                if (lane() == 0) wait_for_turn(turn, in_order ? order.rank : 1);
                __syncwarp();
            }
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                const int unit_row = unit / kUnitsN * 64, unit_col = unit % kUnitsN * 64;
                float4* const unit_slots = slots + unit * (64 * kUnitCols / 4);
                Accumulator<kUnitCols> dq;
                if (!first && in_order)
                    load_sums(dq, unit_slots);
                else
                    dq.clear();
                if (unit == 0) shared.g_full(g.stage).wait(g.phase);
                hold(dq);
                begin_products();
                multiply<T, Config::cols / 16>(dq, columns(shared.g(g.stage), unit_row), columns(shared.k(), unit_col));
                commit_products();
                wait_products<0>();
                hold(dq);
                if (unit == kUnits - 1) {
                    if (signals) shared.g_empty(g.stage).arrive();
                    if (t == walk.tiles - 1 && lane() == 0) shared.k_empty().arrive();
                }
                if (last) {
                    const int row = row0 + unit_row;
                    store_product(dq, factor, p.dq.at<T>(q_begin + int64_t{row}, head) + unit_col, p.dq.row_stride,
                                  mask.len_q - row, p.dim_qk - unit_col);
                } else if (first || in_order) {
                    store_sums(dq, unit_slots);
                } else {
                    add_sums(dq, unit_slots);
                }
            }
            g.next();
            if (!last) {
                __syncwarp();
                if (lane() == 0) end_turn(turn);
            }
        }
        __syncwarp();
        if (walk.tiles == 0 && lane() == 0) shared.k_empty().arrive();
    }
}

}  // namespace hstu::attention::sm90
