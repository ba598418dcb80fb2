// Shared-memory tiles, tile loads and stores, and the matrix products of the SM80 family.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <type_traits>

#include "attention/mask.h"

namespace hstu::attention::sm80 {

using namespace cute;

// Rows of 64 (or 32) elements, 16-byte chunks swizzled so that ldmatrix and fragment stores meet no bank conflict.
// Eight rows of such a panel are contiguous; panels of wider tiles follow one another.
template <int kDim>
constexpr int kPanelCols = kDim % 64 == 0 ? 64 : 32;

template <int kDim>
using PanelAtom = decltype(composition(
    Swizzle<kPanelCols<kDim> == 64 ? 3 : 2, 3, 3>{},
    Layout<Shape<_8, Int<kPanelCols<kDim>>>, Stride<Int<kPanelCols<kDim>>, _1>>{}));

template <int kRows, int kDim>
using TileLayout = decltype(tile_to_shape(PanelAtom<kDim>{}, Shape<Int<kRows>, Int<kDim>>{}));

// The same memory read as its transpose [kDim, kRows].
template <int kRows, int kDim>
using TransposedLayout =
    decltype(composition(TileLayout<kRows, kDim>{}, make_layout(Shape<Int<kDim>, Int<kRows>>{}, GenRowMajor{})));

template <int kRows, int kDim, class T>
__device__ __forceinline__ auto tile(T* smem) {
    return make_tensor(make_smem_ptr(smem), TileLayout<kRows, kDim>{});
}
template <int kRows, int kDim, class T>
__device__ __forceinline__ auto transposed(T* smem) {
    return make_tensor(make_smem_ptr(smem), TransposedLayout<kRows, kDim>{});
}

template <class T>
using MmaAtom = MMA_Atom<std::conditional_t<std::is_same_v<T, cutlass::bfloat16_t>, SM80_16x8x16_F32BF16BF16F32_TN,
                                            SM80_16x8x16_F32F16F16F32_TN>>;

// kWarpsM x kWarpsN warps over a product's rows and columns.
template <class T, int kWarpsM, int kWarpsN>
using Mma = TiledMMA<MmaAtom<T>, Layout<Shape<Int<kWarpsM>, Int<kWarpsN>, _1>>,
                     Tile<Int<16 * kWarpsM>, Int<16 * kWarpsN>, _16>>;

// How threads walk over a tile in 16-byte chunks, a warp covering whole 128-byte (64-byte) row segments.
template <int kRows, int kDim, int kThreads>
struct ChunkWalk {
    static constexpr int kLanes = kPanelCols<kDim> / 8;         // threads a row segment
    static constexpr int kRowStep = kThreads / kLanes;          // rows a pass
    static constexpr int kPasses = kRows / kRowStep;
    static constexpr int kPanels = kDim / kPanelCols<kDim>;
    static constexpr int kSmemStep = kRowStep * kPanelCols<kDim>;  // elements from one pass to the next
    static constexpr int kSmemPanel = kRows * kPanelCols<kDim>;
    static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0);
};

// Asynchronously fills a tile from rows of `stride` elements; rows >= num_rows and columns >= num_cols become 0.
template <int kRows, int kDim, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* smem, const T* global, int64_t stride, int num_rows, int num_cols) {
    using Walk = ChunkWalk<kRows, kDim, kThreads>;
    const int row0 = threadIdx.x / Walk::kLanes, col0 = threadIdx.x % Walk::kLanes * 8;
    const uint32_t base = cast_smem_ptr_to_uint(smem + TileLayout<kRows, kPanelCols<kDim>>{}(row0, col0));
    global += row0 * stride + col0;
    CUTE_UNROLL
    for (int pass = 0; pass < Walk::kPasses; ++pass) {
        CUTE_UNROLL
        for (int panel = 0; panel < Walk::kPanels; ++panel) {
            const bool inside = row0 + pass * Walk::kRowStep < num_rows && col0 + panel * kPanelCols<kDim> < num_cols;
            const uint32_t to = base + sizeof(T) * (pass * Walk::kSmemStep + panel * Walk::kSmemPanel);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
                         "l"(global + panel * kPanelCols<kDim>), "r"(inside ? 16 : 0));
        }
        global += Walk::kRowStep * stride;
    }
}

// Writes a tile's first num_rows rows and num_cols columns, 16 bytes a thread.
template <int kRows, int kDim, int kThreads, class T>
__device__ __forceinline__ void store_tile(const T* smem, T* global, int64_t stride, int num_rows, int num_cols) {
    using Walk = ChunkWalk<kRows, kDim, kThreads>;
    const int row0 = threadIdx.x / Walk::kLanes, col0 = threadIdx.x % Walk::kLanes * 8;
    const T* from = smem + TileLayout<kRows, kPanelCols<kDim>>{}(row0, col0);
    global += row0 * stride + col0;
    CUTE_UNROLL
    for (int pass = 0; pass < Walk::kPasses; ++pass) {
        CUTE_UNROLL
        for (int panel = 0; panel < Walk::kPanels; ++panel)
            if (row0 + pass * Walk::kRowStep < num_rows && col0 + panel * kPanelCols<kDim> < num_cols)
                *reinterpret_cast<uint4*>(global + panel * kPanelCols<kDim>) =
                    *reinterpret_cast<const uint4*>(from + pass * Walk::kSmemStep + panel * Walk::kSmemPanel);
        global += Walk::kRowStep * stride;
    }
}

// Writes 0 to rows [begin, end) of one head: the rows that no sequence uses.
template <class T>
__device__ __forceinline__ void zero_rows(const Jagged& out, int head, int64_t begin, int64_t end, int num_cols) {
    const int chunks = num_cols / 8;
    for (int64_t i = threadIdx.x; i < (end - begin) * chunks; i += blockDim.x)
        *reinterpret_cast<uint4*>(out.at<T>(begin + i / chunks, head) + i % chunks * 8) = uint4{0, 0, 0, 0};
}

// Rows of a [total, heads, dim] result that belong to no used row, cleared by the block that owns rows
// [row0, row0 + rows) of sequence b: its own tail past `len`, past the last block, and before or after all sequences.
template <class T>
__device__ __forceinline__ void zero_unused_rows(const Jagged& out, int head, int num_cols, int b, int batch,
                                                 int64_t total, int64_t begin, int alloc, int len, int row0, int rows,
                                                 bool last_block) {
    const int64_t owned_end = last_block ? alloc : min_of(row0 + rows, alloc);
    if (owned_end > max_of(row0, len)) zero_rows<T>(out, head, begin + max_of(row0, len), begin + owned_end, num_cols);
    if (b == 0 && row0 == 0 && begin > 0) zero_rows<T>(out, head, 0, begin, num_cols);
    if (b == batch - 1 && row0 == 0 && begin + alloc < total)
        zero_rows<T>(out, head, begin + alloc, total, num_cols);
}

// Blocks along a sequence; at least one, which clears the rows that nobody uses.
__host__ __device__ __forceinline__ int block_count(int max_seqlen, int rows) { return max_of(1, ceil_div(max_seqlen, rows)); }

__device__ __forceinline__ Spans aligned(Spans spans, int step) {
    spans.first.begin -= spans.first.begin % step;
    spans.second.begin -= spans.second.begin % step;
    return spans;
}

// The tiles of at most two spans, in order. A tile starts where a span starts and never covers an index twice.
struct TileWalk {
    int first, first_tiles, second, tiles, step;

    __device__ __forceinline__ TileWalk(Spans spans, int step) : step(step) {
        first = spans.first.begin;
        first_tiles = ceil_div(spans.first.size(), step);
        second = spans.second.begin;
        if (first_tiles > 0) second = max_of(second, first + first_tiles * step);
        tiles = first_tiles + ceil_div(Span{second, spans.second.end}.size(), step);
    }
    __device__ __forceinline__ int operator[](int t) const {
        return t < first_tiles ? first + t * step : second + (t - first_tiles) * step;
    }
};

template <class T, class Acc>
__device__ __forceinline__ auto to_type(const Acc& acc) {
    constexpr int kSize = decltype(size(acc))::value;
    cutlass::NumericArrayConverter<T, float, kSize> convert;
    auto converted = convert(*reinterpret_cast<const cutlass::Array<float, kSize>*>(acc.data()));
    auto out = make_tensor<T>(acc.layout());
    *reinterpret_cast<cutlass::Array<T, kSize>*>(out.data()) = converted;
    return out;
}

// An accumulator ((2, 2), M, N) seen as the left operand ((2, 2, 2), M, N / 2) of the next product.
template <class Layout_>
__device__ __forceinline__ auto as_operand_a(Layout_ acc) {
    auto l = logical_divide(acc, Shape<X, X, _2>{});
    return make_layout(make_layout(get<0, 0>(l), get<0, 1>(l), get<2, 0>(l)), get<1>(l), get<2, 1>(l));
}

using LoadRows = SM75_U32x4_LDSM_N;       // operand stored with its k index contiguous
using LoadTransposed = SM75_U16x8_LDSM_T;  // operand stored with its m or n index contiguous

// Registers of one operand and the ldmatrix copies that fill them, k-step by k-step.
template <class Copy, bool kIsA, class T, class TiledMma, class Smem>
struct Operand {
    static __device__ __forceinline__ auto make_copy(TiledMma mma) {
        if constexpr (kIsA) return make_tiled_copy_A(Copy_Atom<Copy, T>{}, mma);
        else return make_tiled_copy_B(Copy_Atom<Copy, T>{}, mma);
    }
    static __device__ __forceinline__ auto make_registers(TiledMma mma, const Smem& smem) {
        if constexpr (kIsA) return make_tensor<T>(partition_shape_A(mma, shape(smem)));
        else return make_tensor<T>(partition_shape_B(mma, shape(smem)));
    }
};

// acc += A B^T with A [M, K] and B [N, K] in shared memory; fragments are loaded one k-step ahead of their use.
template <class CopyA, class CopyB, class TiledMma, class Acc, class SmemA, class SmemB>
__device__ __forceinline__ void matmul(TiledMma mma, Acc& acc, const SmemA& smem_a, const SmemB& smem_b) {
    using T = typename SmemA::value_type;
    using OpA = Operand<CopyA, true, T, TiledMma, SmemA>;
    using OpB = Operand<CopyB, false, T, TiledMma, SmemB>;
    auto a = OpA::make_registers(mma, smem_a);
    auto b = OpB::make_registers(mma, smem_b);
    auto copy_a = OpA::make_copy(mma);
    auto copy_b = OpB::make_copy(mma);
    auto thread_a = copy_a.get_thread_slice(threadIdx.x);
    auto thread_b = copy_b.get_thread_slice(threadIdx.x);
    auto from_a = thread_a.partition_S(smem_a);
    auto from_b = thread_b.partition_S(smem_b);
    auto to_a = thread_a.retile_D(a);
    auto to_b = thread_b.retile_D(b);
    copy(copy_a, from_a(_, _, _0{}), to_a(_, _, _0{}));
    copy(copy_b, from_b(_, _, _0{}), to_b(_, _, _0{}));
    constexpr int kSteps = decltype(size<2>(a))::value;
    CUTE_UNROLL
    for (int k = 0; k < kSteps; ++k) {
        if (k + 1 < kSteps) {
            copy(copy_a, from_a(_, _, k + 1), to_a(_, _, k + 1));
            copy(copy_b, from_b(_, _, k + 1), to_b(_, _, k + 1));
        }
        cute::gemm(mma, a(_, _, k), b(_, _, k), acc);
    }
}

// acc += A B^T with A already in registers.
template <class CopyB, class TiledMma, class Acc, class RegA, class SmemB>
__device__ __forceinline__ void matmul_from_registers(TiledMma mma, Acc& acc, const RegA& a, const SmemB& smem_b) {
    using T = typename SmemB::value_type;
    using OpB = Operand<CopyB, false, T, TiledMma, SmemB>;
    auto b = OpB::make_registers(mma, smem_b);
    auto copy_b = OpB::make_copy(mma);
    auto thread_b = copy_b.get_thread_slice(threadIdx.x);
    auto from_b = thread_b.partition_S(smem_b);
    auto to_b = thread_b.retile_D(b);
    copy(copy_b, from_b(_, _, _0{}), to_b(_, _, _0{}));
    constexpr int kSteps = decltype(size<2>(b))::value;
    CUTE_UNROLL
    for (int k = 0; k < kSteps; ++k) {
        if (k + 1 < kSteps) copy(copy_b, from_b(_, _, k + 1), to_b(_, _, k + 1));
        cute::gemm(mma, a(_, _, k), b(_, _, k), acc);
    }
}

// All of a left operand into registers, to be used by many products.
template <class Copy, class TiledMma, class Smem>
__device__ __forceinline__ auto load_operand_a(TiledMma mma, const Smem& smem) {
    using T = typename Smem::value_type;
    using Op = Operand<Copy, true, T, TiledMma, Smem>;
    auto a = Op::make_registers(mma, smem);
    auto copy_a = Op::make_copy(mma);
    auto thread = copy_a.get_thread_slice(threadIdx.x);
    copy(copy_a, thread.partition_S(smem), thread.retile_D(a));
    return a;
}

// Writes an accumulator, converted to T, into a shared-memory tile.
template <class T, class TiledMma, class Acc, class Smem>
__device__ __forceinline__ void store_accumulator(TiledMma mma, const Acc& acc, Smem&& smem) {
    auto values = to_type<T>(acc);
    auto thread = make_tiled_copy_C(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, T>{}, mma)
                      .get_thread_slice(threadIdx.x);
    copy(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, T>{}, thread.retile_S(values), thread.partition_D(smem));
}

// Calls visit(row, col, element) for each element of a product's accumulator [kRows, kCols] held by this thread,
// row by row; begin_row(row) is called before each row and its result handed to visit.
template <int kRows, int kCols, class TiledMma, class Acc, class BeginRow, class Visit>
__device__ __forceinline__ void for_each_element(TiledMma mma, Acc& acc, BeginRow&& begin_row, Visit&& visit) {
    auto where = mma.get_thread_slice(threadIdx.x).partition_C(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
    CUTE_UNROLL
    for (int m = 0; m < size<1>(acc); ++m) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = get<0>(where(make_coord(0, r), m, 0));
            auto state = begin_row(row);
            CUTE_UNROLL
            for (int n = 0; n < size<2>(acc); ++n) {
                CUTE_UNROLL
                for (int c = 0; c < 2; ++c) {
                    auto at = make_coord(make_coord(c, r), m, n);
                    visit(state, row, get<1>(where(at)), acc(at));
                }
            }
        }
    }
}

}  // namespace hstu::attention::sm80
