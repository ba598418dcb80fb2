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

template <class T, int kHeadDim, class Tile>
struct ForwardShared {
    static constexpr int kQ = Tile::rows * kHeadDim, kKV = Tile::cols * kHeadDim;  // elements
    static constexpr int kBytes = sizeof(T) * (kQ + 4 * kKV);

    T* base;
    __device__ T* q() const { return base; }                                 // [rows, head_dim]; O at the end
    __device__ T* k(int stage) const { return base + kQ + stage * kKV; }      // [cols, head_dim]
    __device__ T* v(int stage) const { return base + kQ + (2 + stage) * kKV; }  // [cols, head_dim]
};

// S -> silu(alpha (S + rab)), 0 where masked.
template <class Tile, class TiledMma, class Acc, class Mask, class Bias>
__device__ __forceinline__ void activate(TiledMma mma, Acc& s, const Mask& mask, const Bias& bias, float alpha, int row0,
                                         int col0) {
    if constexpr (Bias::kKind == BiasKind::kRab)
        for_each_element<Tile::rows, Tile::cols>(
            mma, s, [](int) { return 0; },
            [&](int, int row, int col, float& x) { x += static_cast<float>(bias.at(row0 + row, col0 + col)); });
    if (!mask.is_full(row0, Tile::rows, col0, Tile::cols))
        for_each_element<Tile::rows, Tile::cols>(
            mma, s, [&](int row) { return mask.row(row0 + row); },
            [&](const auto& rule, int, int col, float& x) { x = rule.keeps(col0 + col) ? x : 0.0f; });
    const float half_alpha = 0.5f * alpha;
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) s(i) = silu_of_twice(half_alpha * s(i));
}

template <class T, int kHeadDim, class Mask, class Bias, class Tile>
__global__ void __launch_bounds__(Tile::warps * 32, Tile::blocks) forward_kernel(const __grid_constant__ Params p) {
    constexpr int kRows = Tile::rows, kCols = Tile::cols, kThreads = Tile::warps * 32;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const ForwardShared<T, kHeadDim, Tile> shared{reinterpret_cast<T*>(shared_bytes)};

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
    auto load_kv = [&](int t) {
        const int col0 = walk[t];
        load_tile<kCols, kHeadDim, kThreads>(shared.k(t & 1), k + col0 * p.k.row_stride, p.k.row_stride,
                                             seq.len_k - col0, p.dim_qk);
        load_tile<kCols, kHeadDim, kThreads>(shared.v(t & 1), v + col0 * p.v.row_stride, p.v.row_stride,
                                             seq.len_k - col0, p.dim_v);
    };
    load_tile<kRows, kHeadDim, kThreads>(shared.q(), p.q.at<T>(seq.q_begin + row0, head), p.q.row_stride,
                                         seq.len_q - row0, p.dim_qk);
    if (walk.tiles > 0) load_kv(0);
    cp_async_fence();

    Mma<T, Tile::warps, 1> mma;
    auto q_tile = tile<kRows, kHeadDim>(shared.q());
    auto q_registers = Operand<LoadRows, true, T, decltype(mma), decltype(q_tile)>::make_registers(mma, q_tile);
    auto out = partition_fragment_C(mma, Shape<Int<kRows>, Int<kHeadDim>>{});
    clear(out);

    for (int t = 0; t < walk.tiles; ++t) {
        cp_async_wait<0>();
        __syncthreads();
        if constexpr (Tile::q_in_registers)
            if (t == 0) copy(load_operand_a<LoadRows>(mma, q_tile), q_registers);
        if (t + 1 < walk.tiles) load_kv(t + 1);
        cp_async_fence();

        auto s = partition_fragment_C(mma, Shape<Int<kRows>, Int<kCols>>{});
        clear(s);
        if constexpr (Tile::q_in_registers)
            matmul_from_registers<LoadRows>(mma, s, q_registers, tile<kCols, kHeadDim>(shared.k(t & 1)));
        else
            matmul<LoadRows, LoadRows>(mma, s, q_tile, tile<kCols, kHeadDim>(shared.k(t & 1)));
        activate<Tile>(mma, s, mask, bias, p.alpha, row0, walk[t]);
        auto weights = to_type<T>(s);
        matmul_from_registers<LoadTransposed>(mma, out, make_tensor(weights.data(), as_operand_a(weights.layout())),
                                            transposed<kCols, kHeadDim>(shared.v(t & 1)));
    }

    cp_async_wait<0>();
    __syncthreads();
    CUTE_UNROLL
    for (int i = 0; i < size(out); ++i) out(i) *= p.inv_scaling;
    store_accumulator<T>(mma, out, q_tile);
    __syncthreads();
    store_tile<kRows, kHeadDim, kThreads>(shared.q(), p.out.at<T>(seq.q_begin + row0, head), p.out.row_stride,
                                          seq.len_q - row0, p.dim_v);
}

template <class T, int kHeadDim, class Mask, class Bias, class Tile = ForwardTile<kHeadDim>>
void run_forward(const Params& p, void* stream) {
    const int64_t blocks = int64_t{block_count(p.max_seqlen_q, Tile::rows)} * p.heads * p.batch;
    launch<forward_kernel<T, kHeadDim, Mask, Bias, Tile>>(blocks, Tile::warps * 32,
                                                          ForwardShared<T, kHeadDim, Tile>::kBytes, p.device,
                                                          static_cast<cudaStream_t>(stream), p);
}

}  // namespace hstu::attention::sm80
