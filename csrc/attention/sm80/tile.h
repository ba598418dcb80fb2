// Shared-memory tiles, tile loads and stores, and the warp-level matrix products of the SM80 family.
//
// Everything is built from three hardware operations: cp.async (global to shared, 16 bytes), ldmatrix (shared to
// registers, four 8x8 blocks) and mma m16n8k16 (16-bit operands, fp32 accumulators; CuTe's atom).
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "attention/gpu.h"

namespace hstu::attention::sm80 {

using attention::bf16, attention::fp16, attention::lane, attention::pack, attention::Tile, attention::warp;

// ---- Tiles ----

// How a block's threads walk over a tile in 16-byte chunks, each warp covering whole row segments of a panel.
template <class Tile, int kThreads>
struct ChunkWalk {
    static constexpr int kLanes = Tile::kPanelCols / 8;  // threads a row segment
    static constexpr int kRowStep = kThreads / kLanes;   // rows a pass; whole swizzle periods
    static constexpr int kPasses = Tile::kRows / kRowStep;
    static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0);

    int row = threadIdx.x / kLanes, col = threadIdx.x % kLanes * 8;
};

// Starts copying a tile from global rows of `stride` elements; rows >= num_rows and columns >= num_cols become 0.
template <int kThreads, class Tile, class T>
__device__ __forceinline__ void load_tile(Tile tile, const T* global, int64_t stride, int num_rows, int num_cols) {
    using Walk = ChunkWalk<Tile, kThreads>;
    const Walk walk;
    const uint32_t base = tile.address + Tile::chunk_offset(walk.row, walk.col);
    global += walk.row * stride + walk.col;
#pragma unroll
    for (int pass = 0; pass < Walk::kPasses; ++pass, global += Walk::kRowStep * stride) {
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
            const bool inside =
                walk.row + pass * Walk::kRowStep < num_rows && walk.col + panel * Tile::kPanelCols < num_cols;
            const uint32_t to = base + pass * Walk::kRowStep * Tile::kRowBytes + panel * Tile::kPanelBytes;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
                         "l"(global + panel * Tile::kPanelCols), "r"(inside ? 16 : 0));
        }
    }
}

// Writes a tile's first num_rows rows and num_cols columns to global memory, 16 bytes a thread.
template <int kThreads, class Tile, class T>
__device__ __forceinline__ void store_tile(Tile tile, T* global, int64_t stride, int num_rows, int num_cols) {
    using Walk = ChunkWalk<Tile, kThreads>;
    const Walk walk;
    const uint32_t base = tile.address + Tile::chunk_offset(walk.row, walk.col);
    global += walk.row * stride + walk.col;
#pragma unroll
    for (int pass = 0; pass < Walk::kPasses; ++pass, global += Walk::kRowStep * stride) {
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
            if (walk.row + pass * Walk::kRowStep >= num_rows || walk.col + panel * Tile::kPanelCols >= num_cols)
                continue;
            const uint32_t from = base + pass * Walk::kRowStep * Tile::kRowBytes + panel * Tile::kPanelBytes;
            uint4 chunk;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
                         : "r"(from));
            *reinterpret_cast<uint4*>(global + panel * Tile::kPanelCols) = chunk;
        }
    }
}

// ---- Fragments ----

// A warp's share of a product's accumulator: m16 x n8 blocks from (row, col) on, in the layout of mma.
template <int kBlocksM, int kBlocksN>
struct Accumulator {
    static constexpr int kM = kBlocksM, kN = kBlocksN, kSize = kBlocksM * kBlocksN * 4;
    float x[kM][kN][4];  // [m][n][(row + 8 if 2, 3), (col + 1 if 1, 3)]

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kSize; ++i) flat(i) = 0.0f;
    }
    __device__ __forceinline__ float& flat(int i) { return x[i / (kN * 4)][i / 4 % kN][i % 4]; }
    __device__ __forceinline__ void scale(float factor) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) flat(i) *= factor;
    }
};

// kWarpsM x kWarpsN warps over a [kRows, kCols] product, each owning one contiguous rectangle.
template <int kRows, int kCols, int kWarpsM, int kWarpsN>
struct WarpGrid {
    static constexpr int kM = kRows / kWarpsM / 16, kN = kCols / kWarpsN / 8;
    static_assert(kM * kWarpsM * 16 == kRows && kN * kWarpsN * 8 == kCols && kN % 2 == 0);
    using Acc = Accumulator<kM, kN>;

    static __device__ __forceinline__ int row() { return warp() / kWarpsN * (kM * 16); }
    static __device__ __forceinline__ int col() { return warp() % kWarpsN * (kN * 8); }

    // visit(row, col, element) for each element of this thread; begin_row(row) once a row, its result handed on.
    template <class BeginRow, class Visit>
    static __device__ __forceinline__ void for_each(Acc& acc, BeginRow&& begin_row, Visit&& visit) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row() + m * 16 + half * 8 + lane() / 4;
                const auto state = begin_row(r);
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        visit(state, r, col() + n * 8 + lane() % 4 * 2 + c, acc.x[m][n][half * 2 + c]);
                }
            }
        }
    }

    // Converts to T and writes into a shared-memory tile; `from`: where some of the columns of a share begin in it.
    template <class T, class Tile, int kBlocks>
    static __device__ __forceinline__ void store(const Accumulator<kM, kBlocks>& acc, Tile tile, int from = 0) {
        static_assert(Tile::kRows == kRows && Tile::kDim == kCols);
        const int r = row() + lane() / 4;
        const uint32_t base = tile.address + r * Tile::kRowBytes + lane() % 4 * 4;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            const int c = col() + from + n * 8;
            const uint32_t to =
                base + c / Tile::kPanelCols * Tile::kPanelBytes + ((c % Tile::kPanelCols / 8 ^ Tile::swizzle(r)) << 4);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + (m * 16 + half * 8) * Tile::kRowBytes),
                                 "r"(pack<T>(acc.x[m][n][half * 2], acc.x[m][n][half * 2 + 1])));
            }
        }
    }

    // Converts to T and writes the first num_rows rows and num_cols columns to global memory, 4 bytes a thread.
    template <class T>
    static __device__ __forceinline__ void store_global(const Acc& acc, T* global, int64_t stride, int num_rows,
                                                        int num_cols) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row() + m * 16 + half * 8 + lane() / 4;
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const int c = col() + n * 8 + lane() % 4 * 2;
                    if (r < num_rows && c < num_cols)
                        *reinterpret_cast<uint32_t*>(global + r * stride + c) =
                            pack<T>(acc.x[m][n][half * 2], acc.x[m][n][half * 2 + 1]);
                }
            }
        }
    }
};

// ---- Operands ----

// Reads 16 x 16 blocks of a product's operand from a tile with ldmatrix. kLeft: operand A (m16 x k16) or B (two n8 x
// k16). kTransposed: the tile's rows run along k instead of along m or n. `first`: the operand's first m or n.
template <class Tile_, bool kLeft, bool kTransposed>
struct Operand {
    using Tile = Tile_;
    uint32_t base;  // this lane's row and chunk at block (0, 0)

    __device__ __forceinline__ Operand(Tile tile, int first) {
        const bool rows_first = kLeft != kTransposed;  // order of the four 8 x 8 blocks
        const int row = rows_first ? lane() & 15 : (lane() >> 4) * 8 + (lane() & 7);
        const int chunk = rows_first ? lane() >> 4 : lane() >> 3 & 1;
        if constexpr (kTransposed) {
            base = tile.address + first / Tile::kPanelCols * Tile::kPanelBytes +
                   Tile::chunk_offset(row, (chunk + first % Tile::kPanelCols / 8) * 8);
        } else {
            base = tile.address + Tile::chunk_offset(row, chunk * 8) + first * Tile::kRowBytes;
        }
    }
    // Block i (16 of m or n) and k-step k. Chunk numbers are exclusive-ored, so blocks along a row differ by constants.
    __device__ __forceinline__ void load(uint32_t (&r)[4], int i, int k) const {
        constexpr int kBlocks = Tile::kPanelCols / 16;
        const int along_rows = kTransposed ? k : i, along_cols = kTransposed ? i : k;
        const uint32_t from = (base ^ (along_cols % kBlocks << 5)) + along_cols / kBlocks * Tile::kPanelBytes +
                              along_rows * 16 * Tile::kRowBytes;
        if constexpr (kTransposed)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(from));
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(from));
    }
};

template <class Tile>
using LeftRows = Operand<Tile, true, false>;
template <class Tile>
using LeftColumns = Operand<Tile, true, true>;
template <class Tile>
using RightRows = Operand<Tile, false, false>;
template <class Tile>
using RightColumns = Operand<Tile, false, true>;

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using Atom = std::conditional_t<std::is_same_v<T, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                    cute::SM80_16x8x16_F32F16F16F32_TN>;
    Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// A left operand held in registers: kM blocks of 16 rows, kSteps k-steps.
template <int kM, int kSteps>
struct Registers {
    uint32_t x[kSteps][kM][4];

    template <class From>
    __device__ __forceinline__ void read(const From& from) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int m = 0; m < kM; ++m) from.load(x[k][m], m, k);
        }
    }
};

// An accumulator converted to T, k-step by k-step: the left operand of the next product.
template <class T, int kM, int kN>
__device__ __forceinline__ void convert_step(Registers<kM, kN / 2>& out, const Accumulator<kM, kN>& acc, int k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float (&from)[4] = acc.x[m][2 * k + i / 2];
            out.x[k][m][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
    }
}

// Blocks of a right operand, read a few steps ahead of their use. `order(s)` gives the (block, k) of step s.
template <int kSteps, class B, class Order>
struct Prefetch {
    static constexpr int kAhead = 3;
    const B& from;
    const Order& order;
    uint32_t ring[kAhead + 1][4];

    __device__ __forceinline__ Prefetch(const B& from, const Order& order) : from(from), order(order) {
#pragma unroll
        for (int s = 0; s < kAhead; ++s) read(s);
    }
    __device__ __forceinline__ const uint32_t (&operator[](int s))[4] {
        read(s + kAhead);
        return ring[s % (kAhead + 1)];
    }

  private:
    __device__ __forceinline__ void read(int s) {
        if (s >= kSteps) return;
        const int2 at = order(s);
        from.load(ring[s % (kAhead + 1)], at.x, at.y);
    }
};

template <class T, int kM, int kN>
__device__ __forceinline__ void mma_column_pair(Accumulator<kM, kN>& acc, int pair, const uint32_t (&left)[kM][4],
                                                const uint32_t (&right)[4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        mma<T>(acc.x[m][2 * pair], left[m], right[0], right[1]);
        mma<T>(acc.x[m][2 * pair + 1], left[m], right[2], right[3]);
    }
}

struct Nothing {
    __device__ __forceinline__ void operator()(int) const {}
};

// acc += A B^T over kSteps steps of k = 16, A and B in shared memory. meanwhile(s) is called after step s of
// kSteps * kN / 2, so that other work overlaps with the products.
template <class T, int kSteps, int kM, int kN, class A, class B, class Meanwhile = Nothing>
__device__ __forceinline__ void matmul(Accumulator<kM, kN>& acc, const A& a, const B& b,
                                       const Meanwhile& meanwhile = {}) {
    constexpr int kPairs = kN / 2;
    const auto order = [](int s) { return make_int2(s % kPairs, s / kPairs); };
    Prefetch<kSteps * kPairs, B, decltype(order)> right(b, order);
    uint32_t left[2][kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(left[0][m], m, 0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        if (k + 1 < kSteps) {
#pragma unroll
            for (int m = 0; m < kM; ++m) a.load(left[(k + 1) % 2][m], m, k + 1);
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            mma_column_pair<T>(acc, pair, left[k % 2], right[k * kPairs + pair]);
            meanwhile(k * kPairs + pair);
        }
    }
}

// The same with A in registers: the other work may be computing the next k-steps of A.
template <class T, int kSteps, int kM, int kN, class B, class Meanwhile = Nothing>
__device__ __forceinline__ void matmul_by_rows(Accumulator<kM, kN>& acc, const Registers<kM, kSteps>& a, const B& b,
                                               const Meanwhile& meanwhile = {}) {
    constexpr int kPairs = kN / 2;
    const auto order = [](int s) { return make_int2(s % kPairs, s / kPairs); };
    Prefetch<kSteps * kPairs, B, decltype(order)> right(b, order);
#pragma unroll
    for (int s = 0; s < kSteps * kPairs; ++s) {
        mma_column_pair<T>(acc, s % kPairs, a.x[s / kPairs], right[s]);
        meanwhile(s);
    }
}

// The same with the columns of acc outermost: 16 columns of the result are complete every kSteps steps.
template <class T, int kSteps, int kM, int kN, class B, class Meanwhile = Nothing>
__device__ __forceinline__ void matmul_by_columns(Accumulator<kM, kN>& acc, const Registers<kM, kSteps>& a, const B& b,
                                                  const Meanwhile& meanwhile = {}) {
    constexpr int kPairs = kN / 2;
    const auto order = [](int s) { return make_int2(s / kSteps, s % kSteps); };
    Prefetch<kSteps * kPairs, B, decltype(order)> right(b, order);
#pragma unroll
    for (int s = 0; s < kSteps * kPairs; ++s) {
        mma_column_pair<T>(acc, s / kSteps, a.x[s % kSteps], right[s]);
        meanwhile(s);
    }
}

}  // namespace hstu::attention::sm80
