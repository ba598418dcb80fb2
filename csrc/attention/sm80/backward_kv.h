// HSTU attention backward, key-stationary: dK, dV and, unless a separate pass computes it, dQ.
//
//   dV_j = sum_i P_ij dO_i      G_ij = keep(i, j) silu'(S_ij) / N (dO_i.v_j)
//   dK_j = alpha sum_i G_ij q_i     dQ_i = alpha sum_j G_ij k_j     drab_ij = alpha G_ij     dbias_ij = G_ij
//
// One block: one head, `cols` keys of one sequence; it walks over the query rows that keep any of them, `rows` at a
// time. K and V stay in shared memory, Q and dO come through a two-stage ring. A step has two barriers: the first
// publishes Q and dO (and says that everyone is done with the stage to refill and with P and dS), the second publishes
// P and dS, which the three products after it read as operands. S and dP are set to 0 where masked, so P and G vanish.
// dK and dV are register accumulators; the factors alpha / N and 1 / N are applied once, at the end.
// dQ (DqPlan): stored as final when this block sees every key, or added to fp32 scratch in fragment order, 16 bytes a
// thread and instruction, contiguous over the warp.
#pragma once

#include "attention/activation.h"
#include "attention/bias.h"
#include "attention/sm80/block_order.h"
#include "attention/sm80/plan.h"
#include "attention/sm80/relative_gradient.h"
#include "attention/sm80/tile.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm80 {

template <int kHeadDim, class Config>
struct BackwardShared {
    using QTile = Tile<Config::rows, kHeadDim>;
    using KTile = Tile<Config::cols, kHeadDim>;
    using STile = Tile<Config::rows, Config::cols>;
    static constexpr int kRing = 2 * KTile::kBytes, kScores = kRing + 2 * Config::stages * QTile::kBytes;
    static constexpr int kBytes = kScores + 2 * STile::kBytes;

    uint32_t base;
    __device__ KTile k() const { return {base}; }                  // dK at the end
    __device__ KTile v() const { return {base + KTile::kBytes}; }  // dV at the end
    __device__ QTile q(int stage) const { return {base + kRing + stage * QTile::kBytes}; }
    __device__ QTile dout(int stage) const { return {base + kRing + (Config::stages + stage) * QTile::kBytes}; }
    __device__ STile p() const { return {base + kScores}; }
    __device__ STile ds() const { return {base + kScores + STile::kBytes}; }
};

// (S, dP) -> (P N, G N), both 0 where masked; writes drab.
template <class T, class Grid, class Mask, class Bias>
__device__ __forceinline__ void differentiate(typename Grid::Acc& s, typename Grid::Acc& dp, const Mask& mask,
                                              const Bias& bias, const Params& p, const Dense& drab, int b, int head,
                                              int row0, int rows, int col0, int cols) {
    if constexpr (Bias::kKind == BiasKind::kRab)
        Grid::for_each(
            s, [](int) { return 0; },
            [&](int, int row, int col, float& x) { x += static_cast<float>(bias.at(row0 + row, col0 + col)); });
    if (!mask.is_full(row0, rows, col0, cols)) {
        const auto begin_row = [&](int row) { return mask.row(row0 + row); };
        const auto clear_masked = [&](const auto& rule, int, int col, float& x) {
            x = rule.keeps(col0 + col) ? x : 0.0f;
        };
        Grid::for_each(s, begin_row, clear_masked);
        Grid::for_each(dp, begin_row, clear_masked);
    }
    const float half_alpha = 0.5f * p.alpha;
#pragma unroll
    for (int i = 0; i < Grid::Acc::kSize; ++i) {
        const SiluAndSlope silu = silu_and_slope_of_twice(half_alpha * s.flat(i));
        s.flat(i) = silu.value;
        dp.flat(i) *= silu.slope;
    }
    if constexpr (Bias::kKind == BiasKind::kRab) {
        if (drab.data == nullptr) return;
        const float scale = p.alpha * p.inv_scaling;
        Grid::for_each(
            dp, [](int) { return 0; },
            [&](int, int row, int col, float& x) {
                if (bias.contains(row0 + row, col0 + col))
                    drab.at<T>(b, head, row0 + row + bias.offset)[col0 + col] = static_cast<T>(scale * x);
            });
    }
}

// The same with a relative bias on a piece of 16 columns; with kSums the sums of G by bucket and distance are taken.
// `columns`: memory for them.
template <class Grid, bool kSums, class Acc, class Mask, class Bias, class Columns>
__device__ __forceinline__ void differentiate_piece(Acc& s, Acc& dp, const Mask& mask, bool full, const Bias& bias,
                                                    float alpha, const typename Bias::TileTimes& times,
                                                    const typename Bias::Piece& piece, const TableGradients* gradients,
                                                    TimeSums* time_sums, const Columns& columns, int row0, int col0) {
    constexpr int kSize = Bias::kPieceSize;
    int bucket[kSize];
    bias.template add<kSums>(s, 0, piece, times, row0, col0, 0.5f * alpha, bucket);
    float grad[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        float& x = s.x[Bias::m(i)][Bias::n(i)][Bias::half(i) * 2 + Bias::c(i)];
        float& g = dp.x[Bias::m(i)][Bias::n(i)][Bias::half(i) * 2 + Bias::c(i)];
        const SiluAndSlope silu = silu_and_slope_of_twice(x);
        x = silu.value;
        g *= silu.slope;
        if (!full) {
            const int row = row0 + Grid::row() + Bias::m(i) * 16 + Bias::half(i) * 8 + lane() / 4;
            const int col = col0 + Grid::col() + piece.number * 16 + Bias::n(i) * 8 + lane() % 4 * 2 + Bias::c(i);
            const bool kept = mask.row(row).keeps(col);
            x = kept ? x : 0.0f;
            g = kept ? g : 0.0f;
        }
        grad[i] = g;
    }
    if constexpr (kSums) {
        if (gradients->time != nullptr) time_sums->add_piece(piece.in, grad, bucket, columns);
        add_distances(dp, *gradients, row0 + Grid::row() + bias.offset - col0 - Grid::col() - piece.number * 16,
                      bias.reach);
    }
}

// First scratch tile of a sequence: sequences own whole tiles, at most total_q / rows + batch in all.
template <class Config>
__device__ __forceinline__ int64_t first_accum_tile(const Sequence& seq, int b) {
    return seq.q_begin / Config::rows + b;
}

// This thread's float4 slots in the scratch of one dQ tile; slot i of all threads is contiguous.
template <int kHeadDim, class Config>
__device__ __forceinline__ float4* accum_slots(float* dq_accum, int64_t tile, int heads, int head) {
    return reinterpret_cast<float4*>(dq_accum + (tile * heads + head) * Config::rows * kHeadDim) + threadIdx.x;
}

__device__ __forceinline__ void add_to_global(float4* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
    atomicAdd(&to->x, a);
    atomicAdd(&to->y, b);
    atomicAdd(&to->z, c);
    atomicAdd(&to->w, d);
#endif
}

// The work of one key-stationary block.
template <class T, int kHeadDim, class Mask, class Bias, class Config>
__device__ __forceinline__ void backward_kv_block(const BackwardParams& p, DqPlan plan, BlockOrder::Place place,
                                                  int col_blocks, uint32_t shared_base) {
    constexpr int kRows = Config::rows, kCols = Config::cols, kThreads = Config::warps * 32, kStages = Config::stages;
    using Shared = BackwardShared<kHeadDim, Config>;
    using QTile = typename Shared::QTile;
    using KTile = typename Shared::KTile;
    using STile = typename Shared::STile;
    using ScoreGrid = WarpGrid<kRows, kCols, Config::warps_m_s, Config::warps / Config::warps_m_s>;     // S, dP
    using KeyGrid = WarpGrid<kCols, kHeadDim, Config::warps_m_kv, Config::warps / Config::warps_m_kv>;  // dK, dV
    using QueryGrid = WarpGrid<kRows, kHeadDim, Config::warps_m_q, Config::warps / Config::warps_m_q>;  // dQ
    const Shared shared{shared_base};

    // The earliest keys rank first: under a causal mask they have the most work.
    const auto [b, head, col_block] = place;
    const int col0 = col_block * kCols;
    const Sequence seq(p, b);
    const bool last = col_block == col_blocks - 1;
    zero_unused_rows<T>(p.dk, head, p.dim_qk, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0, kCols,
                        last);
    zero_unused_rows<T>(p.dv, head, p.dim_v, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0, kCols,
                        last);
    if (plan == DqPlan::kDirect)
        zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q,
                            seq.len_k > 0 ? seq.len_q : 0, 0, seq.alloc_q, true);
    if (col0 >= seq.len_k) return;

    const Mask mask(p, seq, b, head);
    const BlockBias<Bias, ScoreGrid, false> bias(p, seq, b, head, col0);
    const TableGradients table_gradients(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
    TimeSums time_sums;
    // A direct dQ needs every row stored; a reduced one needs rows aligned to the scratch tiles.
    const Spans rows = plan == DqPlan::kDirect ? Spans{{0, seq.len_q}, {}} : mask.q_range(col0, kCols);
    const TileWalk walk(aligned(rows, kRows), kRows);
    const T* q = p.q.at<T>(seq.q_begin, head);
    const T* dout = p.dout.at<T>(seq.q_begin, head);
    const auto load_q = [&](int t) {
        const int row0 = walk[t];
        load_tile<kThreads>(shared.q(t % kStages), q + row0 * p.q.row_stride, p.q.row_stride, seq.len_q - row0,
                            p.dim_qk);
        load_tile<kThreads>(shared.dout(t % kStages), dout + row0 * p.dout.row_stride, p.dout.row_stride,
                            seq.len_q - row0, p.dim_v);
    };
    load_tile<kThreads>(shared.k(), p.k.at<T>(seq.k_begin + col0, head), p.k.row_stride, seq.len_k - col0, p.dim_qk);
    load_tile<kThreads>(shared.v(), p.v.at<T>(seq.k_begin + col0, head), p.v.row_stride, seq.len_k - col0, p.dim_v);
    if (walk.tiles > 0) load_q(0);
    cute::cp_async_fence();

    typename KeyGrid::Acc dk, dv;
    dk.clear();
    dv.clear();
    for (int t = 0; t < walk.tiles; ++t) {
        const int row0 = walk[t];
        cute::cp_async_wait<0>();
        __syncthreads();
        if (kStages == 2 && t + 1 < walk.tiles) load_q(t + 1);
        cute::cp_async_fence();
        if constexpr (Bias::kKind == BiasKind::kRelative) {
            // Piece by piece in a loop: the code for one is long and needs many registers.
            const bool full = mask.is_full(row0, kRows, col0, kCols);
            const auto times = bias.times_of(row0, col0);
            const LeftRows<QTile> queries(shared.q(t % kStages), ScoreGrid::row());
            const LeftRows<QTile> douts(shared.dout(t % kStages), ScoreGrid::row());
            RightRows<KTile> keys(shared.k(), ScoreGrid::col()), values(shared.v(), ScoreGrid::col());
#pragma unroll 1
            for (int n = 0; n < ScoreGrid::kN / 2; ++n) {
                const auto piece = bias.piece(times, n, row0, col0);
                Accumulator<ScoreGrid::kM, 2> s, dp;
                s.clear();
                dp.clear();
                matmul<T, kHeadDim / 16>(s, queries, keys);
                matmul<T, kHeadDim / 16>(dp, douts, values);
                keys.base += 16 * KTile::kRowBytes;
                values.base += 16 * KTile::kRowBytes;
                const BucketColumns<STile, ScoreGrid::kM> columns(shared.p(), ScoreGrid::row(),
                                                                  ScoreGrid::col() + n * 16);
                differentiate_piece<ScoreGrid, true>(s, dp, mask, full, bias, p.alpha, times, piece, &table_gradients,
                                                     &time_sums, columns, row0, col0);
                ScoreGrid::template store<T>(s, shared.p(), n * 16);
                ScoreGrid::template store<T>(dp, shared.ds(), n * 16);
            }
        } else {
            typename ScoreGrid::Acc s, dp;
            s.clear();
            dp.clear();
            matmul<T, kHeadDim / 16>(s, LeftRows<QTile>(shared.q(t % kStages), ScoreGrid::row()),
                                     RightRows<KTile>(shared.k(), ScoreGrid::col()));
            matmul<T, kHeadDim / 16>(dp, LeftRows<QTile>(shared.dout(t % kStages), ScoreGrid::row()),
                                     RightRows<KTile>(shared.v(), ScoreGrid::col()));
            differentiate<T, ScoreGrid>(s, dp, mask, bias, p, p.drab, b, head, row0, kRows, col0, kCols);
            ScoreGrid::template store<T>(s, shared.p());
            ScoreGrid::template store<T>(dp, shared.ds());
        }
        __syncthreads();
        matmul<T, kRows / 16>(dv, LeftColumns<STile>(shared.p(), KeyGrid::row()),
                              RightColumns<QTile>(shared.dout(t % kStages), KeyGrid::col()));
        matmul<T, kRows / 16>(dk, LeftColumns<STile>(shared.ds(), KeyGrid::row()),
                              RightColumns<QTile>(shared.q(t % kStages), KeyGrid::col()));
        if (kStages == 1) {
            __syncthreads();
            if (t + 1 < walk.tiles) load_q(t + 1);
            cute::cp_async_fence();
        }
        if (plan == DqPlan::kSeparate) continue;
        typename QueryGrid::Acc dq;
        dq.clear();
        matmul<T, kCols / 16>(dq, LeftRows<STile>(shared.ds(), QueryGrid::row()),
                              RightColumns<KTile>(shared.k(), QueryGrid::col()));
        if (plan == DqPlan::kReduce) {
            float4* slots = accum_slots<kHeadDim, Config>(p.dq_accum, first_accum_tile<Config>(seq, b) + row0 / kRows,
                                                          p.heads, head);
#pragma unroll
            for (int i = 0; i < QueryGrid::Acc::kSize; i += 4)
                add_to_global(slots + i / 4 * kThreads, dq.flat(i), dq.flat(i + 1), dq.flat(i + 2), dq.flat(i + 3));
        } else {
            dq.scale(p.alpha * p.inv_scaling);
            QueryGrid::template store_global<T>(dq, p.dq.at<T>(seq.q_begin + row0, head), p.dq.row_stride,
                                                seq.len_q - row0, p.dim_qk);
        }
    }

    if constexpr (Bias::kKind == BiasKind::kRelative) time_sums.flush(table_gradients, bias.num_buckets);

    cute::cp_async_wait<0>();
    __syncthreads();
    dk.scale(p.alpha * p.inv_scaling);
    dv.scale(p.inv_scaling);
    KeyGrid::template store<T>(dk, shared.k());
    KeyGrid::template store<T>(dv, shared.v());
    __syncthreads();
    store_tile<kThreads>(shared.k(), p.dk.at<T>(seq.k_begin + col0, head), p.dk.row_stride, seq.len_k - col0, p.dim_qk);
    store_tile<kThreads>(shared.v(), p.dv.at<T>(seq.k_begin + col0, head), p.dv.row_stride, seq.len_k - col0, p.dim_v);
}

// The sums of kReduce, scaled and converted: one block a dQ tile, each thread reading back its own fragment.
template <class T, int kHeadDim, class Config>
__global__ void __launch_bounds__(Config::warps * 32)
    backward_dq_convert_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                               int row_blocks) {
    constexpr int kRows = Config::rows, kThreads = Config::warps * 32;
    const auto [b, head, row_block] = order[static_cast<int>(blockIdx.x)];
    const int row0 = row_block * kRows;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
                        row_block == row_blocks - 1);
    if (row0 >= seq.len_q) return;

    using QueryGrid = WarpGrid<kRows, kHeadDim, Config::warps_m_q, Config::warps / Config::warps_m_q>;
    typename QueryGrid::Acc dq;
    const float4* slots =
        accum_slots<kHeadDim, Config>(p.dq_accum, first_accum_tile<Config>(seq, b) + row_block, p.heads, head);
#pragma unroll
    for (int i = 0; i < QueryGrid::Acc::kSize; i += 4) {
        const float4 sum = slots[i / 4 * kThreads];
        dq.flat(i) = sum.x, dq.flat(i + 1) = sum.y, dq.flat(i + 2) = sum.z, dq.flat(i + 3) = sum.w;
    }
    dq.scale(p.alpha * p.inv_scaling);
    QueryGrid::template store_global<T>(dq, p.dq.at<T>(seq.q_begin + row0, head), p.dq.row_stride, seq.len_q - row0,
                                        p.dim_qk);
}

}  // namespace hstu::attention::sm80
