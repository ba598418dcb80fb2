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

template <class T, int kHeadDim, class Tile>
struct BackwardQueryShared {
    static constexpr int kQ = Tile::rows * kHeadDim, kKV = Tile::cols * kHeadDim;
    static constexpr int kBytes = sizeof(T) * (2 * kQ + 4 * kKV);

    T* base;
    __device__ T* q() const { return base; }                                          // [rows, head_dim]; dQ at the end
    __device__ T* dout() const { return base + kQ; }                                  // [rows, head_dim]
    __device__ T* k(int stage) const { return base + 2 * kQ + stage * kKV; }          // [cols, head_dim]
    __device__ T* v(int stage) const { return base + 2 * kQ + (2 + stage) * kKV; }    // [cols, head_dim]
};

template <class T, int kHeadDim, class Mask, class Bias, class Tile>
__global__ void __launch_bounds__(Tile::warps * 32, Tile::blocks)
    backward_q_kernel(const __grid_constant__ BackwardParams p) {
    constexpr int kRows = Tile::rows, kCols = Tile::cols, kThreads = Tile::warps * 32;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const BackwardQueryShared<T, kHeadDim, Tile> shared{reinterpret_cast<T*>(shared_bytes)};

    const int row_blocks = block_count(p.max_seqlen_q, kRows);
    const int head = blockIdx.x / row_blocks % p.heads, b = blockIdx.x / row_blocks / p.heads;
    const int row_block = row_blocks - 1 - static_cast<int>(blockIdx.x % row_blocks), row0 = row_block * kRows;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
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
    load_tile<kRows, kHeadDim, kThreads>(shared.dout(), p.dout.at<T>(seq.q_begin + row0, head), p.dout.row_stride,
                                         seq.len_q - row0, p.dim_v);
    if (walk.tiles > 0) load_kv(0);
    cp_async_fence();

    Mma<T, Tile::warps, 1> mma;
    auto dq = partition_fragment_C(mma, Shape<Int<kRows>, Int<kHeadDim>>{});
    clear(dq);
    for (int t = 0; t < walk.tiles; ++t) {
        cp_async_wait<0>();
        __syncthreads();
        if (t + 1 < walk.tiles) load_kv(t + 1);
        cp_async_fence();
        auto s = partition_fragment_C(mma, Shape<Int<kRows>, Int<kCols>>{});
        auto dp = partition_fragment_C(mma, Shape<Int<kRows>, Int<kCols>>{});
        clear(s);
        clear(dp);
        matmul<LoadRows, LoadRows>(mma, s, tile<kRows, kHeadDim>(shared.q()), tile<kCols, kHeadDim>(shared.k(t & 1)));
        matmul<LoadRows, LoadRows>(mma, dp, tile<kRows, kHeadDim>(shared.dout()), tile<kCols, kHeadDim>(shared.v(t & 1)));
        differentiate<T, Tile>(mma, s, dp, mask, bias, p, Dense{}, b, head, row0, walk[t]);
        auto g = to_type<T>(dp);
        matmul_from_registers<LoadTransposed>(mma, dq, make_tensor(g.data(), as_operand_a(g.layout())),
                                              transposed<kCols, kHeadDim>(shared.k(t & 1)));
    }

    cp_async_wait<0>();
    __syncthreads();
    CUTE_UNROLL
    for (int i = 0; i < size(dq); ++i) dq(i) *= p.alpha * p.inv_scaling;
    store_accumulator<T>(mma, dq, tile<kRows, kHeadDim>(shared.q()));
    __syncthreads();
    store_tile<kRows, kHeadDim, kThreads>(shared.q(), p.dq.at<T>(seq.q_begin + row0, head), p.dq.row_stride,
                                          seq.len_q - row0, p.dim_qk);
}

}  // namespace hstu::attention::sm80
