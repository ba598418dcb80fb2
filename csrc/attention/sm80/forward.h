// HSTU attention forward, mma.sync + cp.async (compute capability 8.0 and later).
//
//   O_i = 1/N sum_j keep(i, j) silu(alpha (q_i.k_j + rab_ij) + bias_ij) v_j
//
// One block: one head, `rows` queries of one sequence. Q stays in shared memory (or registers); K and V tiles of `cols`
// keys come through a two-stage ring, the next pair being fetched while this one is used; a single barrier a step both
// publishes the pair that has landed and frees the stage to be refilled. The walk covers only the mask's key spans.
// S is a register accumulator; masked elements are set to 0, and silu(0) = 0 removes them; full tiles test nothing.
// Rows past the sequence are loaded as 0, which does the same. P stays in registers as the left operand of P V, or, where
// several warps share the rows (warps_n), passes through shared memory, which costs a barrier and saves reads of K and V.
#pragma once

#include "attention/activation.h"
#include "attention/bias.h"
#include "attention/sm80/block_order.h"
#include "attention/sm80/relative.h"
#include "attention/sm80/tile.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm80 {

template <int kHeadDim, class Config>
struct ForwardShared {
    using QTile = Tile<Config::rows, kHeadDim>;
    using KTile = Tile<Config::cols, kHeadDim>;
    using PTile = Tile<Config::rows, Config::cols>;
    static constexpr int kP = QTile::kBytes + 4 * KTile::kBytes;
    static constexpr int kBytes = kP + (Config::warps_n > 1 ? 2 * PTile::kBytes : 0);

    uint32_t base;
    __device__ QTile q() const { return {base}; }  // O at the end
    __device__ KTile k(int stage) const { return {base + QTile::kBytes + stage * KTile::kBytes}; }
    __device__ KTile v(int stage) const { return {base + QTile::kBytes + (2 + stage) * KTile::kBytes}; }
    __device__ PTile p(int stage) const { return {base + kP + stage * PTile::kBytes}; }  // with warps_n > 1
};

template <int kHeadDim, class Config>
struct ForwardGrids {
    static constexpr int kWarpsM = Config::warps / Config::warps_n;
    using Score = WarpGrid<Config::rows, Config::cols, kWarpsM, Config::warps_n>;
    using Out = WarpGrid<Config::rows, kHeadDim, kWarpsM, Config::warps_n>;
};

// S -> P N = silu(alpha (S + rab)), 0 where masked, in ranges of elements that can be interleaved with products. With a
// relative bias, which is added to a whole tile, S comes as (alpha S + bias) / 2.
template <class Grid, class Mask, class Bias, bool kMasked>
struct Activation {
    static constexpr int kPiece = Grid::kM * 8;  // this thread's elements in 16 columns, numbered one after another
    static constexpr int kSize = Grid::Acc::kSize;

    typename Grid::Acc& s;
    const Mask& mask;
    const Bias& bias;
    int row0, col0;
    float half_alpha;

    __device__ __forceinline__ void operator()(int from, int to) const {
#pragma unroll
        for (int i = from; i < to; ++i) {
            const int m = i % kPiece / 8, n = 2 * (i / kPiece) + i / 4 % 2, half = i / 2 % 2, c = i % 2;
            float& x = s.x[m][n][half * 2 + c];
            if constexpr (kMasked || Bias::kKind == BiasKind::kRab) {
                const int row = row0 + Grid::row() + m * 16 + half * 8 + lane() / 4;
                const int col = col0 + Grid::col() + n * 8 + lane() % 4 * 2 + c;
                if constexpr (Bias::kKind == BiasKind::kRab) x += static_cast<float>(bias.at(row, col));
                if constexpr (kMasked) x = mask.row(row).keeps(col) ? x : 0.0f;
            }
            x = silu_of_twice(Bias::kKind == BiasKind::kRelative ? x : half_alpha * x);
        }
    }
    // Part `step` of `steps` of elements [from, to).
    __device__ __forceinline__ void part(int from, int to, int step, int steps) const {
        (*this)(from + (to - from) * step / steps, from + (to - from) * (step + 1) / steps);
    }
};

// out += P V for one tile of keys with a relative bias, a few pieces of 16 keys at a time in a loop: the code for a piece
// is long, and a loop that outgrows the instruction cache costs more than products that wait for one another.
template <class T, int kHeadDim, class Config, class KTile, class Q, class Out, class Mask, class Bias, class Ready>
__device__ __forceinline__ void attend_relative(Out& out, const Q& q, KTile k, KTile v, const Mask& mask,
                                                const Bias& bias, int row0, int col0, float alpha,
                                                const Ready& values_ready) {
    using Grid = typename ForwardGrids<kHeadDim, Config>::Score;
    // Where Q is read from shared memory, twice as many keys share what is read.
    constexpr int kPieces = Config::q_in_registers ? 1 : 2, kSteps = kHeadDim / 16;
    const bool full = mask.is_full(row0, Config::rows, col0, Config::cols);
    const auto times = bias.times_of(row0, col0);
    RightRows<KTile> keys(k, 0);
    RightColumns<KTile> values(v, 0);
#pragma unroll 1
    for (int first = 0; first < Bias::kPieces; first += kPieces) {
        typename Bias::Piece pieces[kPieces];
#pragma unroll
        for (int n = 0; n < kPieces; ++n) pieces[n] = bias.piece(times, first + n, row0, col0);
        Accumulator<Grid::kM, 2 * kPieces> s;
        s.clear();
        if constexpr (Config::q_in_registers)
            matmul_by_rows<T>(s, q, keys);
        else
            matmul<T, kSteps>(s, q, keys);
        keys.base += kPieces * 16 * KTile::kRowBytes;
        Registers<Grid::kM, kPieces> weights;
#pragma unroll
        for (int n = 0; n < kPieces; ++n) {
            int unused[Bias::kPieceSize];
            bias.template add<false>(s, 2 * n, pieces[n], times, row0, col0, 0.5f * alpha, unused);
        }
        if (!full) {
#pragma unroll
            for (int i = 0; i < s.kSize; ++i) {
                const int row = row0 + Grid::row() + i / (8 * kPieces) * 16 + i / 2 % 2 * 8 + lane() / 4;
                const int col = col0 + first * 16 + i / 4 % (2 * kPieces) * 8 + lane() % 4 * 2 + i % 2;
                s.flat(i) = mask.row(row).keeps(col) ? s.flat(i) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < s.kSize; ++i) s.flat(i) = silu_of_twice(s.flat(i));
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) convert_step<T>(weights, s, piece);
        if (first == 0) values_ready();
        matmul_by_rows<T>(out, weights, values);
        values.base += kPieces * 16 * KTile::kRowBytes;
    }
}

// out += P V for one tile of keys, P staying in registers; values_ready() is called before V is read. The activation of
// 16 keys runs among the products of the 16 keys before (or, where Q is in registers, already among the products that
// compute the following scores), so that the tensor cores and the special-function units work at the same time.
template <class T, int kHeadDim, class Config, bool kMasked, class KTile, class Q, class Out, class Mask, class Bias,
          class Ready>
__device__ __forceinline__ void attend(Out& out, const Q& q, KTile k, KTile v, const Mask& mask, const Bias& bias,
                                       int row0, int col0, float alpha, const Ready& values_ready) {
    using Grid = typename ForwardGrids<kHeadDim, Config>::Score;
    using Act = Activation<Grid, Mask, Bias, kMasked>;
    constexpr int kPieces = Grid::kN / 2, kPiece = Act::kPiece, kSteps = kHeadDim / 16;
    typename Grid::Acc s;
    s.clear();
    const Act activate{s, mask, bias, row0, col0, 0.5f * alpha};
    Registers<Grid::kM, kPieces> weights;
    const auto activate_piece = [&](int piece, int step, int steps) {
        activate.part(piece * kPiece, (piece + 1) * kPiece, step, steps);
        if (step + 1 == steps) convert_step<T>(weights, s, piece);
    };
    const RightRows<KTile> keys(k, 0);
    const RightColumns<KTile> values(v, 0);
    if constexpr (Config::q_in_registers) {
        matmul_by_columns<T>(s, q, keys, [&](int step) {
            if (step >= kSteps) activate_piece(step / kSteps - 1, step % kSteps, kSteps);
        });
        activate_piece(kPieces - 1, 0, 1);
        values_ready();
        matmul_by_rows<T>(out, weights, values);
    } else {
        matmul<T, kSteps>(s, q, keys);
        activate_piece(0, 0, 1);
        values_ready();
        constexpr int kPairs = Out::kN / 2;
        matmul_by_rows<T>(out, weights, values, [&](int step) {
            if (step / kPairs + 1 < kPieces) activate_piece(step / kPairs + 1, step % kPairs, kPairs);
        });
    }
}

// The walk with P in registers. K(t), V(t) are in flight when it starts, K first.
template <class T, int kHeadDim, class Config, class Shared, class Out, class Mask, class Bias, class LoadK,
          class LoadV>
__device__ __forceinline__ void walk_keys(Out& out, const Shared& shared, const TileWalk& walk, const LoadK& load_k,
                                          const LoadV& load_v, const Mask& mask, const Bias& bias, int row0,
                                          float alpha) {
    const LeftRows<typename Shared::QTile> q_shared(shared.q(), ForwardGrids<kHeadDim, Config>::Score::row());
    Registers<Out::kM, kHeadDim / 16> q_registers;
    const int warp_row0 = row0 + ForwardGrids<kHeadDim, Config>::Score::row();
    for (int t = 0; t < walk.tiles; ++t) {
        // The first scores need not wait for the first values.
        if (t == 0)
            cute::cp_async_wait<1>();
        else
            cute::cp_async_wait<0>();
        __syncthreads();
        if constexpr (Config::q_in_registers) {
            if (t == 0) q_registers.read(q_shared);
        }
        if (t + 1 < walk.tiles) load_k(t + 1), load_v(t + 1);
        cute::cp_async_fence();
        const auto values_ready = [&] {
            if (t > 0) return;
            cute::cp_async_wait<1>();
            __syncthreads();
        };
        if (t > 0 && warp_row0 >= mask.len_q) continue;
        const auto step = [&](auto masked) {
            const auto run = [&](const auto& q) {
                if constexpr (Bias::kKind == BiasKind::kRelative)
                    attend_relative<T, kHeadDim, Config>(out, q, shared.k(t & 1), shared.v(t & 1), mask, bias, row0,
                                                         walk[t], alpha, values_ready);
                else
                    attend<T, kHeadDim, Config, decltype(masked)::value>(out, q, shared.k(t & 1), shared.v(t & 1), mask,
                                                                         bias, row0, walk[t], alpha, values_ready);
            };
            if constexpr (Config::q_in_registers)
                run(q_registers);
            else
                run(q_shared);
        };
        // Of a tile that the block needs in part, this warp's rows may need nothing.
        const bool full = mask.is_full(row0, Config::rows, walk[t], Config::cols);
        const bool needed = full || t == 0 || !Mask::kCheapRanges ||
                            overlaps(mask.kv_range(warp_row0, Out::kM * 16), walk[t], Config::cols);
        if constexpr (Bias::kKind == BiasKind::kRelative) {
            if (needed) step(std::false_type{});
        } else if (full) {
            step(std::false_type{});
        } else if (needed) {
            step(std::true_type{});
        }
    }
}

// S -> (alpha S + bias) / 2 with a relative bias, 0 where masked: the activation after it tests nothing.
template <class Grid, class Config, class Mask, class Bias>
__device__ __forceinline__ void add_relative(typename Grid::Acc& s, const Mask& mask, const Bias& bias, int row0,
                                             int col0, float half_alpha) {
    const auto times = bias.times_of(row0, col0);
#pragma unroll
    for (int n = 0; n < Bias::kPieces; ++n) {
        int unused[Bias::kPieceSize];
        bias.template add<false>(s, 2 * n, bias.piece(times, n, row0, col0), times, row0, col0, half_alpha, unused);
    }
    if (mask.is_full(row0, Config::rows, col0, Config::cols)) return;
    Grid::for_each(
        s, [&](int row) { return mask.row(row0 + row); },
        [&](const auto& rule, int, int col, float& x) { x = rule.keeps(col0 + col) ? x : 0.0f; });
}

// The walk with P in shared memory, the scores one tile ahead of the values: while the tensor cores add P(t) V(t), the
// other units turn S(t + 1) into P(t + 1). One barrier a step publishes K(t + 1), V(t) and P(t) and frees the stages
// that the step refills.
template <class T, int kHeadDim, class Config, class Shared, class Out, class Mask, class Bias, class LoadK,
          class LoadV>
__device__ __forceinline__ void walk_keys_ahead(Out& out, const Shared& shared, const TileWalk& walk,
                                                const LoadK& load_k, const LoadV& load_v, const Mask& mask,
                                                const Bias& bias, int row0, float alpha) {
    using Grid = typename ForwardGrids<kHeadDim, Config>::Score;
    using OutGrid = typename ForwardGrids<kHeadDim, Config>::Out;
    if (walk.tiles == 0) return;
    const LeftRows<typename Shared::QTile> q(shared.q(), Grid::row());
    const auto score = [&](typename Grid::Acc& s, int t) {
        s.clear();
        matmul<T, kHeadDim / 16>(s, q, RightRows<typename Shared::KTile>(shared.k(t & 1), Grid::col()));
        if constexpr (Bias::kKind == BiasKind::kRelative)
            add_relative<Grid, Config>(s, mask, bias, row0, walk[t], 0.5f * alpha);
    };
    const auto add_values = [&](int t, const auto& meanwhile) {
        matmul<T, Config::cols / 16>(out, LeftRows<typename Shared::PTile>(shared.p(t & 1), OutGrid::row()),
                                     RightColumns<typename Shared::KTile>(shared.v(t & 1), OutGrid::col()), meanwhile);
    };
    // Calls `run` with the activation of tile t, masked or not.
    const auto with_activation = [&](typename Grid::Acc& s, int t, const auto& run) {
        if (Bias::kKind == BiasKind::kRelative || mask.is_full(row0, Config::rows, walk[t], Config::cols))
            run(Activation<Grid, Mask, Bias, false>{s, mask, bias, row0, walk[t], 0.5f * alpha});
        else
            run(Activation<Grid, Mask, Bias, true>{s, mask, bias, row0, walk[t], 0.5f * alpha});
    };

    if (walk.tiles > 1) load_k(1);
    cute::cp_async_fence();
    cute::cp_async_wait<2>();
    __syncthreads();
    typename Grid::Acc s;
    score(s, 0);
    with_activation(s, 0, [](const auto& activate) { activate(0, Grid::Acc::kSize); });
    Grid::template store<T>(s, shared.p(0));

    for (int t = 0; t < walk.tiles; ++t) {
        cute::cp_async_wait<0>();
        __syncthreads();
        if (t + 2 < walk.tiles) load_k(t + 2);
        if (t + 1 < walk.tiles) load_v(t + 1);
        cute::cp_async_fence();
        if (t + 1 == walk.tiles) {
            add_values(t, Nothing{});
            break;
        }
        score(s, t + 1);
        constexpr int kSteps = Config::cols / 16 * OutGrid::kN / 2;
        with_activation(s, t + 1, [&](const auto& activate) {
            add_values(t, [&](int step) { activate.part(0, Grid::Acc::kSize, step, kSteps); });
        });
        Grid::template store<T>(s, shared.p((t + 1) & 1));
    }
}

template <class T, int kHeadDim, class Mask, class Bias, class Config>
__global__ void __launch_bounds__(Config::warps * 32, Config::blocks)
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ BlockOrder order, int row_blocks) {
    constexpr int kRows = Config::rows, kCols = Config::cols, kThreads = Config::warps * 32;
    using Shared = ForwardShared<kHeadDim, Config>;
    using OutGrid = typename ForwardGrids<kHeadDim, Config>::Out;
    using ScoreGrid = typename ForwardGrids<kHeadDim, Config>::Score;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const Shared shared{static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))};

    const auto [b, head, rank] = order[static_cast<int>(blockIdx.x)];
    const int row_block = row_blocks - 1 - rank, row0 = row_block * kRows;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.out, head, p.dim_v, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
                        row_block == row_blocks - 1);
    if (row0 >= seq.len_q) return;

    const Mask mask(p, seq, b, head);
    const BlockBias<Bias, ScoreGrid, true> bias(p, seq, b, head, row0);
    const TileWalk walk(mask.kv_range(row0, kRows), kCols);
    const T* k = p.k.at<T>(seq.k_begin, head);
    const T* v = p.v.at<T>(seq.k_begin, head);
    const auto load_k = [&](int t) {
        load_tile<kThreads>(shared.k(t & 1), k + walk[t] * p.k.row_stride, p.k.row_stride, seq.len_k - walk[t],
                            p.dim_qk);
    };
    const auto load_v = [&](int t) {
        load_tile<kThreads>(shared.v(t & 1), v + walk[t] * p.v.row_stride, p.v.row_stride, seq.len_k - walk[t],
                            p.dim_v);
    };
    load_tile<kThreads>(shared.q(), p.q.at<T>(seq.q_begin + row0, head), p.q.row_stride, seq.len_q - row0, p.dim_qk);
    if (walk.tiles > 0) load_k(0);
    cute::cp_async_fence();
    if (walk.tiles > 0) load_v(0);
    cute::cp_async_fence();

    typename OutGrid::Acc out;
    out.clear();
    if constexpr (Config::warps_n > 1)
        walk_keys_ahead<T, kHeadDim, Config>(out, shared, walk, load_k, load_v, mask, bias, row0, p.alpha);
    else
        walk_keys<T, kHeadDim, Config>(out, shared, walk, load_k, load_v, mask, bias, row0, p.alpha);

    cute::cp_async_wait<0>();
    __syncthreads();
    out.scale(p.inv_scaling);
    OutGrid::template store<T>(out, shared.q());
    __syncthreads();
    store_tile<kThreads>(shared.q(), p.out.at<T>(seq.q_begin + row0, head), p.out.row_stride, seq.len_q - row0,
                         p.dim_v);
}

template <class T, int kHeadDim, class Mask, class Bias, class Config>
void launch_forward(const Params& p, void* stream) {
    const int row_blocks = block_count(p.max_seqlen_q, Config::rows);
    const BlockOrder order(p, row_blocks, Config::blocks * multiprocessors(p.device), l2_cache_bytes(p.device));
    launch<forward_kernel<T, kHeadDim, Mask, Bias, Config>>(int64_t{row_blocks} * p.heads * p.batch, Config::warps * 32,
                                                            ForwardShared<kHeadDim, Config>::kBytes, p.device,
                                                            static_cast<cudaStream_t>(stream), p, order, row_blocks);
}

template <class T, int kHeadDim, class Mask, class Bias>
void run_forward(const Params& p, void* stream) {
    constexpr bool kRelative = Bias::kKind == BiasKind::kRelative;
    using LongTile = ForwardTile<kHeadDim>;
    using ShortTile = ShortForwardTile<kHeadDim>;
    using Long = std::conditional_t<kRelative, RelativeTile<LongTile>, LongTile>;
    using Short = std::conditional_t<kRelative, RelativeTile<ShortTile>, ShortTile>;
    if constexpr (Short::up_to > 0) {
        const bool is_short = p.total_q <= int64_t{Short::up_to} * p.batch;
        if (is_short || ForwardShared<kHeadDim, Long>::kBytes > max_shared_bytes(p.device))
            return launch_forward<T, kHeadDim, Mask, Bias, Short>(p, stream);
    }
    launch_forward<T, kHeadDim, Mask, Bias, Long>(p, stream);
}

}  // namespace hstu::attention::sm80
