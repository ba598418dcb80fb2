// HSTU attention backward, query-stationary: dQ alone, without atomics or scratch.
//
//   dQ_i = alpha sum_j G_ij k_j
//
// One block: one head, `rows` queries of one sequence. Q and dO stay in shared memory, K and V come through a two-stage
// ring as in the forward. S and dP are recomputed (two of the backward's five products a second time: 7 / 5 of its
// work in all), G stays in registers as the left operand of G K. Each dQ tile has one owner and one order of addition,
// so the result is bitwise reproducible.
#pragma once

#include "attention/sm80/backward_kv.h"

namespace hstu::attention::sm80 {

template <int kHeadDim, class Config>
struct BackwardQueryShared {
    using QTile = Tile<Config::q_rows, kHeadDim>;
    using KTile = Tile<Config::q_cols, kHeadDim>;
    static constexpr int kRing = 2 * QTile::kBytes, kBytes = kRing + 4 * KTile::kBytes;

    uint32_t base;
    __device__ QTile q() const { return {base}; }  // dQ at the end
    __device__ QTile dout() const { return {base + QTile::kBytes}; }
    __device__ KTile k(int stage) const { return {base + kRing + stage * KTile::kBytes}; }
    __device__ KTile v(int stage) const { return {base + kRing + (2 + stage) * KTile::kBytes}; }
};

// The work of one query-stationary block.
template <class T, int kHeadDim, class Mask, class Bias, class Config>
__device__ __forceinline__ void backward_q_block(const BackwardParams& p, BlockOrder::Place place, int row_blocks,
                                                 uint32_t shared_base) {
    constexpr int kRows = Config::q_rows, kCols = Config::q_cols, kThreads = Config::warps * 32;
    using Shared = BackwardQueryShared<kHeadDim, Config>;
    using QTile = typename Shared::QTile;
    using KTile = typename Shared::KTile;
    using ScoreGrid = WarpGrid<kRows, kCols, Config::warps, 1>;
    using QueryGrid = WarpGrid<kRows, kHeadDim, Config::warps, 1>;
    const Shared shared{shared_base};

    const auto [b, head, rank] = place;
    const int row_block = row_blocks - 1 - rank, row0 = row_block * kRows;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
                        row_block == row_blocks - 1);
    if (row0 >= seq.len_q) return;

    const Mask mask(p, seq, b, head);
    const BlockBias<Bias, ScoreGrid, true> bias(p, seq, b, head, row0);
    const TileWalk walk(mask.kv_range(row0, kRows), kCols);
    const T* k = p.k.at<T>(seq.k_begin, head);
    const T* v = p.v.at<T>(seq.k_begin, head);
    const auto load_kv = [&](int t) {
        const int col0 = walk[t];
        load_tile<kThreads>(shared.k(t & 1), k + col0 * p.k.row_stride, p.k.row_stride, seq.len_k - col0, p.dim_qk);
        load_tile<kThreads>(shared.v(t & 1), v + col0 * p.v.row_stride, p.v.row_stride, seq.len_k - col0, p.dim_v);
    };
    load_tile<kThreads>(shared.q(), p.q.at<T>(seq.q_begin + row0, head), p.q.row_stride, seq.len_q - row0, p.dim_qk);
    load_tile<kThreads>(shared.dout(), p.dout.at<T>(seq.q_begin + row0, head), p.dout.row_stride, seq.len_q - row0,
                        p.dim_v);
    if (walk.tiles > 0) load_kv(0);
    cute::cp_async_fence();

    const LeftRows<QTile> q(shared.q(), ScoreGrid::row()), dout(shared.dout(), ScoreGrid::row());
    typename QueryGrid::Acc dq;
    dq.clear();
    // A relative bias takes few keys at a time: where registers allow it, Q and dO are not read again for each of them.
    constexpr bool kInRegisters = Bias::kKind == BiasKind::kRelative && kHeadDim <= 128;
    Registers<ScoreGrid::kM, kHeadDim / 16> q_registers, dout_registers;
    for (int t = 0; t < walk.tiles; ++t) {
        cute::cp_async_wait<0>();
        __syncthreads();
        if constexpr (kInRegisters) {
            if (t == 0) q_registers.read(q), dout_registers.read(dout);
        }
        if (t + 1 < walk.tiles) load_kv(t + 1);
        cute::cp_async_fence();
        if constexpr (Bias::kKind == BiasKind::kRelative) {
            const bool full = mask.is_full(row0, kRows, walk[t], kCols);
            const auto times = bias.times_of(row0, walk[t]);
            RightRows<KTile> keys(shared.k(t & 1), 0), values(shared.v(t & 1), 0);
            RightColumns<KTile> products(shared.k(t & 1), 0);
#pragma unroll 1
            for (int n = 0; n < kCols / 16; ++n) {
                const auto piece = bias.piece(times, n, row0, walk[t]);
                Accumulator<ScoreGrid::kM, 2> s, dp;
                s.clear();
                dp.clear();
                if constexpr (kInRegisters) {
                    matmul_by_rows<T>(s, q_registers, keys);
                    matmul_by_rows<T>(dp, dout_registers, values);
                } else {
                    matmul<T, kHeadDim / 16>(s, q, keys);
                    matmul<T, kHeadDim / 16>(dp, dout, values);
                }
                differentiate_piece<ScoreGrid, false>(s, dp, mask, full, bias, p.alpha, times, piece, nullptr, nullptr,
                                                      0, row0, walk[t]);
                Registers<ScoreGrid::kM, 1> g;
                convert_step<T>(g, dp, 0);
                matmul_by_rows<T>(dq, g, products);
                keys.base += 16 * KTile::kRowBytes;
                values.base += 16 * KTile::kRowBytes;
                products.base += 16 * KTile::kRowBytes;
            }
        } else {
            typename ScoreGrid::Acc s, dp;
            s.clear();
            dp.clear();
            matmul<T, kHeadDim / 16>(s, q, RightRows<KTile>(shared.k(t & 1), 0));
            matmul<T, kHeadDim / 16>(dp, dout, RightRows<KTile>(shared.v(t & 1), 0));
            differentiate<T, ScoreGrid>(s, dp, mask, bias, p, Dense{}, b, head, row0, kRows, walk[t], kCols);
            Registers<ScoreGrid::kM, kCols / 16> g;
#pragma unroll
            for (int step = 0; step < kCols / 16; ++step) convert_step<T>(g, dp, step);
            matmul_by_rows<T>(dq, g, RightColumns<KTile>(shared.k(t & 1), 0));
        }
    }

    cute::cp_async_wait<0>();
    __syncthreads();
    dq.scale(p.alpha * p.inv_scaling);
    QueryGrid::template store<T>(dq, shared.q());
    __syncthreads();
    store_tile<kThreads>(shared.q(), p.dq.at<T>(seq.q_begin + row0, head), p.dq.row_stride, seq.len_q - row0, p.dim_qk);
}

}  // namespace hstu::attention::sm80
