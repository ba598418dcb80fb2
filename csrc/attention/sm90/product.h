// Warpgroup matrix products: D[64, n] += A[64, k] B[k, n], 16-bit operands, fp32 sums (CuTe's wgmma atoms).
//
// B, and A unless it is in registers, are read from swizzled tiles (attention/gpu.h; a 1024-byte aligned tile has the
// layout that TMA and wgmma know as 128-byte swizzle, or 64-byte for panels of 32 columns). A tile serves either way
// round: rows(tile): its rows run along m or n, its columns along k; columns(tile): its rows run along k.
//
// Products are asynchronous: begin_products(), any number of multiply(), commit_products(), wait_products<n>(). After the
// wait, hold() an accumulator before ordinary code reads it, so that the compiler moves no read in front of the wait. Never
// hold() one between begin and wait, or a loop-carried one before begin: ptxas would then run the products one after
// another (its warning C7514).
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // widths such as 80
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "attention/gpu.h"

namespace hstu::attention::sm90 {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// This thread's part of a [64, kCols] product. Element i lies in row 16 * warp + lane / 4 + 8 * (i / 2 % 2) of the
// warpgroup and column i / 4 * 8 + lane % 4 * 2 + i % 2.
template <int kCols_>
struct Accumulator {
    static constexpr int kCols = kCols_, kSize = kCols / 2;
    float x[kSize];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = 0.0f;
    }
    static __device__ __forceinline__ int row() { return (threadIdx.x / 32 % 4) * 16 + lane() / 4; }
    static __device__ __forceinline__ int col() { return lane() % 4 * 2; }
};

// Left operand in registers: [64, 16 * kSteps] in wgmma's (and mma's) layout.
template <int kSteps_>
struct Fragments {
    static constexpr int kSteps = kSteps_;
    uint32_t x[kSteps][4];
};

// Columns [16 step, 16 step + 16) of an accumulator as a left operand.
template <class T, int kCols>
__device__ __forceinline__ void convert_step(Fragments<kCols / 16>& out, const Accumulator<kCols>& acc, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.x[step][i] = pack<T>(acc.x[step * 8 + 2 * i], acc.x[step * 8 + 2 * i + 1]);
}

// Writes four 8 x 8 blocks, in the layout of Fragments, to shared memory: lane i gives the address of row i % 8 of block
// i / 8.
__device__ __forceinline__ void write_blocks(uint32_t to, const uint32_t (&blocks)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(blocks[0]),
                 "r"(blocks[1]), "r"(blocks[2]), "r"(blocks[3])
                 : "memory");
}

// The same the other way round.
__device__ __forceinline__ void read_blocks(uint32_t (&blocks)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                 : "r"(from)
                 : "memory");
}

template <class Tile, bool kColumns>
struct SharedOperand {
    static constexpr Major kMajor = kColumns ? Major::MN : Major::K;
    static constexpr int kLayout = Tile::kPanelCols == 64 ? 1 : 2;  // 128-byte or 64-byte swizzle
    uint64_t descriptor;

    // `first`: the tile's row (rows) or column (columns) where m or n starts; a multiple of 8 rows or of a panel, or
    // half a panel from where no more than that half is read.
    __device__ __forceinline__ explicit SharedOperand(Tile tile, int first = 0) {
        const uint32_t start =
            tile.address + (kColumns ? first / Tile::kPanelCols * Tile::kPanelBytes + first % Tile::kPanelCols * 2
                                     : first * Tile::kRowBytes);
        constexpr uint64_t kLeading = kColumns ? Tile::kPanelBytes / 16 : 1;  // between panels along m or n
        constexpr uint64_t kStride = 8 * Tile::kRowBytes / 16;                // between groups of eight rows
        descriptor = (start & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | uint64_t{kLayout} << 62;
    }
    // k-step `step` of 16.
    __device__ __forceinline__ uint64_t at(int step) const {
        constexpr int kSteps = Tile::kPanelCols / 16;
        const int bytes =
            kColumns ? step * 16 * Tile::kRowBytes : step / kSteps * Tile::kPanelBytes + step % kSteps * 32;
        return descriptor + bytes / 16;
    }
};
template <class Tile>
__device__ __forceinline__ SharedOperand<Tile, false> rows(Tile tile, int first = 0) {
    return SharedOperand<Tile, false>(tile, first);
}
template <class Tile>
__device__ __forceinline__ SharedOperand<Tile, true> columns(Tile tile, int first = 0) {
    return SharedOperand<Tile, true>(tile, first);
}

template <class T, int kCols>
struct Atom;
#define HSTU_ATOM(T, name, n)                                                        \
    template <>                                                                      \
    struct Atom<T, n> {                                                              \
        template <Major a, Major b>                                                  \
        using Shared = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_SS<a, b>;       \
        template <Major b>                                                           \
        using Mixed = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_RS<Major::K, b>; \
    };
#define HSTU_ATOMS(n)            \
    HSTU_ATOM(bf16, BF16BF16, n) \
    HSTU_ATOM(fp16, F16F16, n)
HSTU_ATOMS(16)
HSTU_ATOMS(32)
HSTU_ATOMS(64)
HSTU_ATOMS(80)
HSTU_ATOMS(96)
HSTU_ATOMS(112)
HSTU_ATOMS(128)
HSTU_ATOMS(160)
HSTU_ATOMS(192)
HSTU_ATOMS(256)
#undef HSTU_ATOMS
#undef HSTU_ATOM

__device__ __forceinline__ void begin_products() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void commit_products() { cute::warpgroup_commit_batch(); }
// All but the last kPending committed groups are complete.
template <int kPending>
__device__ __forceinline__ void wait_products() {
    cute::warpgroup_wait<kPending>();
}

// The compiler moves no use of these registers across this point.
template <int kCols>
__device__ __forceinline__ void hold(Accumulator<kCols>& acc) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) asm volatile("" : "+f"(acc.x[i])::"memory");
}
template <int kSteps>
__device__ __forceinline__ void hold(Fragments<kSteps>& left) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) asm volatile("" : "+r"(left.x[i / 4][i % 4])::"memory");
}

// acc = A B over k-step `step` of both, added to what acc holds unless `replace`.
template <class T, int kCols, class TileA, bool kColumnsA, class TileB, bool kColumnsB, size_t... I>
__device__ __forceinline__ void multiply_step(Accumulator<kCols>& acc, const SharedOperand<TileA, kColumnsA>& a,
                                              const SharedOperand<TileB, kColumnsB>& b, int step, ScaleOut scale,
                                              std::index_sequence<I...>) {
    using Fma = typename Atom<T, kCols>::template Shared<SharedOperand<TileA, kColumnsA>::kMajor,
                                                         SharedOperand<TileB, kColumnsB>::kMajor>;
    Fma::fma(a.at(step), b.at(step), acc.x[I]..., scale);
}
template <class T, int kCols, int kSteps, class TileB, bool kColumnsB, size_t... I>
__device__ __forceinline__ void multiply_step(Accumulator<kCols>& acc, const Fragments<kSteps>& a,
                                              const SharedOperand<TileB, kColumnsB>& b, int step, ScaleOut scale,
                                              std::index_sequence<I...>) {
    using Fma = typename Atom<T, kCols>::template Mixed<SharedOperand<TileB, kColumnsB>::kMajor>;
    Fma::fma(a.x[step][0], a.x[step][1], a.x[step][2], a.x[step][3], b.at(step), acc.x[I]..., scale);
}

// acc += A B over k-step `step` of 16.
template <class T, int kCols, class A, class B>
__device__ __forceinline__ void multiply_step(Accumulator<kCols>& acc, const A& a, const B& b, int step) {
    multiply_step<T>(acc, a, b, step, ScaleOut::One, std::make_index_sequence<kCols / 2>{});
}

// acc += A B (acc = A B with kReplace) over k-steps [0, kSteps) of 16.
template <class T, int kSteps, bool kReplace = false, int kCols, class A, class B>
__device__ __forceinline__ void multiply(Accumulator<kCols>& acc, const A& a, const B& b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        multiply_step<T>(acc, a, b, step, kReplace && step == 0 ? ScaleOut::Zero : ScaleOut::One,
                         std::make_index_sequence<kCols / 2>{});
}

}  // namespace hstu::attention::sm90
