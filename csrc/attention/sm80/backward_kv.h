// HSTU attention backward, key-stationary: dK, dV and, unless a separate pass computes it, dQ.
//
//   dV_j = sum_i P_ij dO_i      G_ij = keep(i, j) silu'(S_ij) / N (dO_i.v_j)
//   dK_j = alpha sum_i G_ij q_i     dQ_i = alpha sum_j G_ij k_j     drab_ij = alpha G_ij
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
#include "attention/sm80/plan.h"
#include "attention/sm80/tile.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm80 {

template <class T, int kHeadDim, class Tile>
struct BackwardShared {
    static constexpr int kQ = Tile::rows * kHeadDim, kKV = Tile::cols * kHeadDim, kS = Tile::rows * Tile::cols;
    static constexpr int kBytes = sizeof(T) * (2 * kKV + 4 * kQ + 2 * kS);

    T* base;
    __device__ T* k() const { return base; }        // [cols, head_dim]; dK at the end
    __device__ T* v() const { return base + kKV; }  // [cols, head_dim]; dV at the end
    __device__ T* q(int stage) const { return base + 2 * kKV + stage * kQ; }            // [rows, head_dim]
    __device__ T* dout(int stage) const { return base + 2 * kKV + (2 + stage) * kQ; }   // [rows, head_dim]
    __device__ T* p() const { return base + 2 * kKV + 4 * kQ; }                         // [rows, cols]
    __device__ T* ds() const { return p() + kS; }                                       // [rows, cols]
};

// (S, dP) -> (P N, G N), both 0 where masked; writes drab.
template <class T, class Tile, class TiledMma, class Acc, class Mask, class Bias>
__device__ __forceinline__ void differentiate(TiledMma mma, Acc& s, Acc& dp, const Mask& mask, const Bias& bias,
                                              const Params& p, const Dense& drab, int b, int head, int row0, int col0) {
    if constexpr (Bias::kKind == BiasKind::kRab)
        for_each_element<Tile::rows, Tile::cols>(
            mma, s, [](int) { return 0; },
            [&](int, int row, int col, float& x) { x += static_cast<float>(bias.at(row0 + row, col0 + col)); });
    if (!mask.is_full(row0, Tile::rows, col0, Tile::cols)) {
        const auto begin_row = [&](int row) { return mask.row(row0 + row); };
        const auto clear_masked = [&](const auto& rule, int, int col, float& x) {
            x = rule.keeps(col0 + col) ? x : 0.0f;
        };
        for_each_element<Tile::rows, Tile::cols>(mma, s, begin_row, clear_masked);
        for_each_element<Tile::rows, Tile::cols>(mma, dp, begin_row, clear_masked);
    }
    const float half_alpha = 0.5f * p.alpha;
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) {
        const SiluAndSlope silu = silu_and_slope_of_twice(half_alpha * s(i));
        s(i) = silu.value;
        dp(i) *= silu.slope;
    }
    if constexpr (Bias::kKind == BiasKind::kRab) {
        if (drab.data == nullptr) return;
        const float scale = p.alpha * p.inv_scaling;
        for_each_element<Tile::rows, Tile::cols>(
            mma, dp, [](int) { return 0; }, [&](int, int row, int col, float& x) {
                if (bias.contains(row0 + row, col0 + col))
                    drab.at<T>(b, head, row0 + row + bias.offset)[col0 + col] = static_cast<T>(scale * x);
            });
    }
}

// First scratch tile of a sequence: sequences own whole tiles, at most total_q / rows + batch in all.
template <class Tile>
__device__ __forceinline__ int64_t first_accum_tile(const Sequence& seq, int b) {
    return seq.q_begin / Tile::rows + b;
}

// This thread's float4 slots in the scratch of one dQ tile; slot i of all threads is contiguous.
template <int kHeadDim, class Tile>
__device__ __forceinline__ float4* accum_slots(float* dq_accum, int64_t tile, int heads, int head) {
    return reinterpret_cast<float4*>(dq_accum + (tile * heads + head) * Tile::rows * kHeadDim) + threadIdx.x;
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

// Stores a [kRows, head_dim] accumulator times `scale`, row 0 at `global`, straight from registers.
template <class T, int kRows, int kHeadDim, class TiledMma, class Acc>
__device__ __forceinline__ void store_fragment(TiledMma mma, Acc& acc, float scale, T* global, int64_t stride,
                                               int num_rows, int num_cols) {
    auto where = mma.get_thread_slice(threadIdx.x).partition_C(make_identity_tensor(Shape<Int<kRows>, Int<kHeadDim>>{}));
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 2) {
        const int row = get<0>(where(i)), col = get<1>(where(i));
        const cutlass::Array<T, 2> pair = cutlass::NumericArrayConverter<T, float, 2>{}(
            cutlass::Array<float, 2>{acc(i) * scale, acc(i + 1) * scale});
        if (row < num_rows && col < num_cols)
            *reinterpret_cast<uint32_t*>(global + row * stride + col) = reinterpret_cast<const uint32_t&>(pair);
    }
}

template <class T, int kHeadDim, class Mask, class Bias, class Tile>
__global__ void __launch_bounds__(Tile::warps * 32, Tile::blocks)
    backward_kv_kernel(const __grid_constant__ BackwardParams p, DqPlan plan) {
    constexpr int kRows = Tile::rows, kCols = Tile::cols, kThreads = Tile::warps * 32;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const BackwardShared<T, kHeadDim, Tile> shared{reinterpret_cast<T*>(shared_bytes)};

    // Earlier keys first: under a causal mask they have the most work.
    const int col_blocks = block_count(p.max_seqlen_k, kCols);
    const int col_block = blockIdx.x % col_blocks, col0 = col_block * kCols;
    const int head = blockIdx.x / col_blocks % p.heads, b = blockIdx.x / col_blocks / p.heads;
    const Sequence seq(p, b);
    const bool last = col_block == col_blocks - 1;
    zero_unused_rows<T>(p.dk, head, p.dim_qk, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0, kCols, last);
    zero_unused_rows<T>(p.dv, head, p.dim_v, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0, kCols, last);
    if (plan == DqPlan::kDirect)
        zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q,
                            seq.len_k > 0 ? seq.len_q : 0, 0, seq.alloc_q, true);
    if (col0 >= seq.len_k) return;

    const Mask mask(p, seq, b, head);
    const Bias bias(p, seq, b, head);
    // A direct dQ needs every row stored; a reduced one needs rows aligned to the scratch tiles.
    const Spans rows = plan == DqPlan::kDirect ? Spans{{0, seq.len_q}, {}} : mask.q_range(col0, kCols);
    const TileWalk walk(aligned(rows, kRows), kRows);
    const T* q = p.q.at<T>(seq.q_begin, head);
    const T* dout = p.dout.at<T>(seq.q_begin, head);
    auto load_q = [&](int t) {
        const int row0 = walk[t];
        load_tile<kRows, kHeadDim, kThreads>(shared.q(t & 1), q + row0 * p.q.row_stride, p.q.row_stride,
                                             seq.len_q - row0, p.dim_qk);
        load_tile<kRows, kHeadDim, kThreads>(shared.dout(t & 1), dout + row0 * p.dout.row_stride, p.dout.row_stride,
                                             seq.len_q - row0, p.dim_v);
    };
    load_tile<kCols, kHeadDim, kThreads>(shared.k(), p.k.at<T>(seq.k_begin + col0, head), p.k.row_stride,
                                         seq.len_k - col0, p.dim_qk);
    load_tile<kCols, kHeadDim, kThreads>(shared.v(), p.v.at<T>(seq.k_begin + col0, head), p.v.row_stride,
                                         seq.len_k - col0, p.dim_v);
    if (walk.tiles > 0) load_q(0);
    cp_async_fence();

    Mma<T, Tile::warps_m_s, Tile::warps / Tile::warps_m_s> mma_s;     // S, dP: [rows, cols]
    Mma<T, Tile::warps_m_kv, Tile::warps / Tile::warps_m_kv> mma_kv;  // dK, dV: [cols, head_dim]
    Mma<T, Tile::warps_m_q, Tile::warps / Tile::warps_m_q> mma_q;     // dQ: [rows, head_dim]
    auto dk = partition_fragment_C(mma_kv, Shape<Int<kCols>, Int<kHeadDim>>{});
    auto dv = partition_fragment_C(mma_kv, Shape<Int<kCols>, Int<kHeadDim>>{});
    clear(dk);
    clear(dv);

    for (int t = 0; t < walk.tiles; ++t) {
        const int row0 = walk[t];
        cp_async_wait<0>();
        __syncthreads();
        if (t + 1 < walk.tiles) load_q(t + 1);
        cp_async_fence();
        {
            auto s = partition_fragment_C(mma_s, Shape<Int<kRows>, Int<kCols>>{});
            auto dp = partition_fragment_C(mma_s, Shape<Int<kRows>, Int<kCols>>{});
            clear(s);
            clear(dp);
            matmul<LoadRows, LoadRows>(mma_s, s, tile<kRows, kHeadDim>(shared.q(t & 1)), tile<kCols, kHeadDim>(shared.k()));
            matmul<LoadRows, LoadRows>(mma_s, dp, tile<kRows, kHeadDim>(shared.dout(t & 1)),
                                       tile<kCols, kHeadDim>(shared.v()));
            differentiate<T, Tile>(mma_s, s, dp, mask, bias, p, p.drab, b, head, row0, col0);
            store_accumulator<T>(mma_s, s, tile<kRows, kCols>(shared.p()));
            store_accumulator<T>(mma_s, dp, tile<kRows, kCols>(shared.ds()));
        }
        __syncthreads();
        matmul<LoadTransposed, LoadTransposed>(mma_kv, dv, transposed<kRows, kCols>(shared.p()),
                                               transposed<kRows, kHeadDim>(shared.dout(t & 1)));
        matmul<LoadTransposed, LoadTransposed>(mma_kv, dk, transposed<kRows, kCols>(shared.ds()),
                                               transposed<kRows, kHeadDim>(shared.q(t & 1)));
        if (plan == DqPlan::kSeparate) continue;
        auto dq = partition_fragment_C(mma_q, Shape<Int<kRows>, Int<kHeadDim>>{});
        clear(dq);
        matmul<LoadRows, LoadTransposed>(mma_q, dq, tile<kRows, kCols>(shared.ds()), transposed<kCols, kHeadDim>(shared.k()));
        if (plan == DqPlan::kReduce) {
            float4* slots = accum_slots<kHeadDim, Tile>(p.dq_accum, first_accum_tile<Tile>(seq, b) + row0 / kRows, p.heads, head);
            CUTE_UNROLL
            for (int i = 0; i < size(dq) / 4; ++i)
                add_to_global(slots + i * kThreads, dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
        } else {
            store_fragment<T, kRows, kHeadDim>(mma_q, dq, p.alpha * p.inv_scaling, p.dq.at<T>(seq.q_begin + row0, head),
                                               p.dq.row_stride, seq.len_q - row0, p.dim_qk);
        }
    }

    cp_async_wait<0>();
    __syncthreads();
    CUTE_UNROLL
    for (int i = 0; i < size(dk); ++i) {
        dk(i) *= p.alpha * p.inv_scaling;
        dv(i) *= p.inv_scaling;
    }
    store_accumulator<T>(mma_kv, dk, tile<kCols, kHeadDim>(shared.k()));
    store_accumulator<T>(mma_kv, dv, tile<kCols, kHeadDim>(shared.v()));
    __syncthreads();
    store_tile<kCols, kHeadDim, kThreads>(shared.k(), p.dk.at<T>(seq.k_begin + col0, head), p.dk.row_stride,
                                          seq.len_k - col0, p.dim_qk);
    store_tile<kCols, kHeadDim, kThreads>(shared.v(), p.dv.at<T>(seq.k_begin + col0, head), p.dv.row_stride,
                                          seq.len_k - col0, p.dim_v);
}

// The sums of kReduce, scaled and converted: one block a dQ tile, each thread reading back its own fragment.
template <class T, int kHeadDim, class Tile>
__global__ void __launch_bounds__(Tile::warps * 32) backward_dq_convert_kernel(const __grid_constant__ BackwardParams p) {
    constexpr int kRows = Tile::rows, kThreads = Tile::warps * 32;
    const int row_blocks = block_count(p.max_seqlen_q, kRows);
    const int row_block = blockIdx.x % row_blocks, row0 = row_block * kRows;
    const int head = blockIdx.x / row_blocks % p.heads, b = blockIdx.x / row_blocks / p.heads;
    const Sequence seq(p, b);
    zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q, seq.len_q, row0, kRows,
                        row_block == row_blocks - 1);
    if (row0 >= seq.len_q) return;

    Mma<T, Tile::warps_m_q, Tile::warps / Tile::warps_m_q> mma;
    auto dq = partition_fragment_C(mma, Shape<Int<kRows>, Int<kHeadDim>>{});
    const float4* slots = accum_slots<kHeadDim, Tile>(p.dq_accum, first_accum_tile<Tile>(seq, b) + row_block, p.heads, head);
    CUTE_UNROLL
    for (int i = 0; i < size(dq) / 4; ++i) {
        const float4 sum = slots[i * kThreads];
        dq(4 * i) = sum.x, dq(4 * i + 1) = sum.y, dq(4 * i + 2) = sum.z, dq(4 * i + 3) = sum.w;
    }
    store_fragment<T, kRows, kHeadDim>(mma, dq, p.alpha * p.inv_scaling, p.dq.at<T>(seq.q_begin + row0, head),
                                       p.dq.row_stride, seq.len_q - row0, p.dim_qk);
}

}  // namespace hstu::attention::sm80
