// HSTU attention forward, mma.sync + cp.async (compute capability 8.0 and later).
//
//   O_i = 1/N sum_j keep(i, j) silu(alpha (q_i.k_j + rab_ij)) v_j
//
// One block: one head, `rows` queries of one sequence. Q stays in shared memory (or registers); K and V tiles of `cols`
// keys come through a two-stage ring, the next pair being fetched while this one is used; a single barrier a step both
// publishes the pair that has landed and frees the stage to be refilled. The walk covers only the mask's key spans.
// S is a register accumulator; masked elements are set to 0, and silu(0) = 0 removes them; full tiles test nothing.
// Rows past the sequence are loaded as 0, which does the same. P stays in registers as the left operand of P V.
#pragma once

#include "attention/activation.h"
#include "attention/bias.h"
#include "attention/sm80/tile.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm80 {

template <int kHeadDim, class Config>
struct ForwardShared {
    using QTile = Tile<Config::rows, kHeadDim>;
    using KTile = Tile<Config::cols, kHeadDim>;
    static constexpr int kBytes = QTile::kBytes + 4 * KTile::kBytes;

    uint32_t base;
    __device__ QTile q() const { return {base}; }  // O at the end
    __device__ KTile k(int stage) const { return {base + QTile::kBytes + stage * KTile::kBytes}; }
    __device__ KTile v(int stage) const { return {base + QTile::kBytes + (2 + stage) * KTile::kBytes}; }
};

// S -> P N = silu(alpha (S + rab)), 0 where masked, in pieces of 16 keys that can be interleaved with products.
template <class Grid, class Mask, class Bias, bool kMasked>
struct Activation {
    static constexpr int kPiece = Grid::kM * 8;  // elements of this thread in 16 columns

    typename Grid::Acc& s;
    const Mask& mask;
    const Bias& bias;
    int row0, col0;
    float half_alpha;

    // Elements [from, to) of 16-column piece `piece`.
    __device__ __forceinline__ void operator()(int piece, int from, int to) const {
#pragma unroll
        for (int i = from; i < to; ++i) {
            const int m = i / 8, n = 2 * piece + i / 4 % 2, half = i / 2 % 2, c = i % 2;
            float& x = s.x[m][n][half * 2 + c];
            if constexpr (kMasked || Bias::kKind == BiasKind::kRab) {
                const int row = row0 + Grid::row() + m * 16 + half * 8 + lane() / 4;
                const int col = col0 + Grid::col() + n * 8 + lane() % 4 * 2 + c;
                if constexpr (Bias::kKind == BiasKind::kRab) x += static_cast<float>(bias.at(row, col));
                if constexpr (kMasked) x = mask.row(row).keeps(col) ? x : 0.0f;
            }
            x = silu_of_twice(half_alpha * x);
        }
    }
};

// out += P V for one tile of keys. The activation of 16 keys runs among the products of the 16 keys before (or, where
// Q is in registers, already among the products that compute the following scores), so that the tensor cores and the
// special-function units work at the same time.
template <class T, int kHeadDim, class Config, bool kMasked, class Q, class KTile, class Out, class Mask, class Bias>
__device__ __forceinline__ void attend(Out& out, const Q& q, KTile k, KTile v, const Mask& mask, const Bias& bias,
                                       int row0, int col0, float alpha) {
    using Grid = WarpGrid<Config::rows, Config::cols, Config::warps, 1>;
    using Act = Activation<Grid, Mask, Bias, kMasked>;
    constexpr int kPieces = Config::cols / 16, kOutPairs = kHeadDim / 16, kPiece = Act::kPiece;
    typename Grid::Acc s;
    s.clear();
    Registers<Grid::kM, kPieces> weights;
    const Act activate{s, mask, bias, row0, col0, 0.5f * alpha};
    const auto among = [&](int piece, int step, int steps) {
        activate(piece, step * kPiece / steps, (step + 1) * kPiece / steps);
        if (step + 1 == steps) convert_step<T>(weights, s, piece);
    };
    const RightRows<KTile> keys(k, 0);
    if constexpr (Config::q_in_registers) {
        constexpr int kSteps = kHeadDim / 16;
        matmul_by_columns<T>(s, q, keys, [&](int step) {
            if (step >= kSteps) among(step / kSteps - 1, step % kSteps, kSteps);
        });
        among(kPieces - 1, 0, 1);
        matmul_by_rows<T>(out, weights, RightColumns<KTile>(v, 0));
    } else {
        matmul<T, kHeadDim / 16>(s, q, keys);
        among(0, 0, 1);
        matmul_by_rows<T>(out, weights, RightColumns<KTile>(v, 0), [&](int step) {
            if (step / kOutPairs + 1 < kPieces) among(step / kOutPairs + 1, step % kOutPairs, kOutPairs);
        });
    }
}

template <class T, int kHeadDim, class Mask, class Bias, class Config>
__global__ void __launch_bounds__(Config::warps * 32, Config::blocks) forward_kernel(const __grid_constant__ Params p) {
    constexpr int kRows = Config::rows, kCols = Config::cols, kThreads = Config::warps * 32;
    using Shared = ForwardShared<kHeadDim, Config>;
    using ScoreGrid = WarpGrid<kRows, kCols, Config::warps, 1>;
    using OutGrid = WarpGrid<kRows, kHeadDim, Config::warps, 1>;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const Shared shared{static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))};

    // Later queries first: under a causal mask they have the most work.
    const int row_blocks = block_count(p.max_seqlen_q, kRows);
    const int head = blockIdx.x / row_blocks % p.heads, b = blockIdx.x / row_blocks / p.heads;
    const int row_block = row_blocks - 1 - static_cast<int>(blockIdx.x % row_blocks), row0 = row_block * kRows;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.out, head, p.dim_v, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
                        row_block == row_blocks - 1);
    if (row0 >= seq.len_q) return;

    const Mask mask(p, seq, b, head);
    const Bias bias(p, seq, b, head);
    const TileWalk walk(mask.kv_range(row0, kRows), kCols);
    const T* k = p.k.at<T>(seq.k_begin, head);
    const T* v = p.v.at<T>(seq.k_begin, head);
    const auto load_kv = [&](int t) {
        const int col0 = walk[t];
        load_tile<kThreads>(shared.k(t & 1), k + col0 * p.k.row_stride, p.k.row_stride, seq.len_k - col0, p.dim_qk);
        load_tile<kThreads>(shared.v(t & 1), v + col0 * p.v.row_stride, p.v.row_stride, seq.len_k - col0, p.dim_v);
    };
    load_tile<kThreads>(shared.q(), p.q.at<T>(seq.q_begin + row0, head), p.q.row_stride, seq.len_q - row0, p.dim_qk);
    if (walk.tiles > 0) load_kv(0);
    cute::cp_async_fence();

    const LeftRows<typename Shared::QTile> q_shared(shared.q(), ScoreGrid::row());
    Registers<ScoreGrid::kM, kHeadDim / 16> q_registers;
    typename OutGrid::Acc out;
    out.clear();

    for (int t = 0; t < walk.tiles; ++t) {
        cute::cp_async_wait<0>();
        __syncthreads();
        if constexpr (Config::q_in_registers) {
            if (t == 0) q_registers.read(q_shared);
        }
        if (t + 1 < walk.tiles) load_kv(t + 1);
        cute::cp_async_fence();
        const auto step = [&](auto masked) {
            const auto run = [&](const auto& q) {
                attend<T, kHeadDim, Config, decltype(masked)::value>(out, q, shared.k(t & 1), shared.v(t & 1), mask,
                                                                     bias, row0, walk[t], p.alpha);
            };
            if constexpr (Config::q_in_registers) run(q_registers);
            else run(q_shared);
        };
        if (mask.is_full(row0, kRows, walk[t], kCols)) step(std::false_type{});
        else step(std::true_type{});
    }

    cute::cp_async_wait<0>();
    __syncthreads();
    out.scale(p.inv_scaling);
    OutGrid::template store<T>(out, shared.q());
    __syncthreads();
    store_tile<kThreads>(shared.q(), p.out.at<T>(seq.q_begin + row0, head), p.out.row_stride, seq.len_q - row0, p.dim_v);
}

template <class T, int kHeadDim, class Mask, class Bias, class Config = ForwardTile<kHeadDim>>
void run_forward(const Params& p, void* stream) {
    const int64_t blocks = int64_t{block_count(p.max_seqlen_q, Config::rows)} * p.heads * p.batch;
    launch<forward_kernel<T, kHeadDim, Mask, Bias, Config>>(blocks, Config::warps * 32,
                                                            ForwardShared<kHeadDim, Config>::kBytes, p.device,
                                                            static_cast<cudaStream_t>(stream), p);
}

}  // namespace hstu::attention::sm80
