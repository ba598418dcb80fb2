// Copies between packed [rows, heads, dim] tensors and shared memory by TMA, with the bounds of one sequence.
//
// Rows behind a sequence's last one must read as 0 (0 * NaN would reach the result) and must not be written, and TMA
// knows only the bounds of the whole tensor. So the map has a row dimension of `reach` (at least the longest sequence)
// and a fourth dimension whose stride is one row again. Row r of a sequence that starts at packed row `begin` with `len`
// rows has the coordinates
//     (column, reach - len + r, head, begin + len)
// and, as the map starts `reach` rows before the tensor, the address of packed row begin + r; r >= len is out of bounds.
// A box that is out of bounds altogether still touches the memory where its map starts, which may not be the tensor's:
// such boxes go through a map of their own.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/params.h"
#include "common/cuda.h"

namespace hstu::attention::sm90 {

// libcuda is not linked: its entry point is asked for at run time.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
                   "looking up cuTensorMapEncodeTiled");
#else
        check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
                   "looking up cuTensorMapEncodeTiled");
#endif
        if (found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("hstu_ext: this driver has no cuTensorMapEncodeTiled; it must know CUDA 12.0");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    return encoder;
}

// TMA copies of boxes of `box_rows` rows and `panel` columns (64: 128-byte swizzle, 32: 64-byte swizzle), one head.
struct SequenceMap {
    CUtensorMap map;
    CUtensorMap nothing;  // starts at the tensor; (0, 1, 0, 0) is out of bounds
    int dim, reach;
    int head_step;  // 0 where all heads are one (expanded): stride 0 is no TMA stride

    // dim: columns of the tensor; those behind it read as 0 too. rows: packed rows. max_length: no sequence is longer.
    template <class T>
    static SequenceMap make(const Jagged& x, int64_t rows, int heads, int dim, int max_length, int box_rows,
                            int panel) {
        SequenceMap result{};
        if (rows == 0) return result;  // nothing will be copied
        result.dim = dim;
        result.reach = max_of(1, max_length);
        result.head_step = x.head_stride != 0;
        const uint64_t row_bytes = max_of<int64_t>(16, 2 * x.row_stride);
        const uint64_t head_bytes = max_of<int64_t>(16, 2 * x.head_stride);
        char* const start = static_cast<char*>(x.data);
        const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
        encode<T>(result.map, start - result.reach * row_bytes,
                  {size(dim), size(result.reach), size(max_of(1, heads)), size(rows + 1)},
                  {row_bytes, head_bytes, row_bytes}, box_rows, panel);
        encode<T>(result.nothing, start, {8, 1, 1, 1}, {16, 16, 16}, box_rows, panel);
        return result;
    }

  private:
    template <class T>
    static void encode(CUtensorMap& map, void* start, const std::array<cuuint64_t, 4>& dims,
                       const std::array<cuuint64_t, 3>& strides, int box_rows, int panel) {
        const cuuint32_t box[] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box_rows), 1, 1};
        const cuuint32_t steps[] = {1, 1, 1, 1};
        const auto run = [&] {
            return tensor_map_encoder()(
                &map,
                std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4, start, dims.data(), strides.data(), box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                panel == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        };
        CUresult status = run();
        if (status == CUDA_ERROR_INVALID_CONTEXT) {  // a thread's first call: the runtime has not given it one yet
            int device = 0;
            check_cuda(cudaGetDevice(&device), "asking for the device");
            check_cuda(cudaSetDevice(device), "starting a thread on the device");
            check_cuda(cudaFree(nullptr), "starting a thread on the device");
            status = run();
        }
        if (status != CUDA_SUCCESS)
            throw std::runtime_error("hstu_ext: cuTensorMapEncodeTiled failed with CUresult " +
                                     std::to_string(static_cast<int>(status)));
    }
};

#if defined(__CUDACC__)

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box_in(uint32_t to, uint32_t barrier, const CUtensorMap& map, int col, int row,
                                            int head, int end) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(end)
        : "memory");
}

// The same to all blocks of the cluster in `mask`, each at its own `to` and `barrier`.
__device__ __forceinline__ void copy_box_in_to_all(uint32_t to, uint32_t barrier, const CUtensorMap& map, int col,
                                                   int row, int head, int end, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(end), "h"(mask)
        : "memory");
}

__device__ __forceinline__ void copy_box_out(const CUtensorMap& map, uint32_t from, int col, int row, int head,
                                             int end) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(col), "r"(row), "r"(head), "r"(end)
                 : "memory");
}
__device__ __forceinline__ void commit_copies_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most kPending of this thread's committed groups have not yet read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_copies_out_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... have not yet written global memory.
template <int kPending>
__device__ __forceinline__ void wait_copies_out() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// One head's rows of one sequence, seen through a map.
struct SequenceRows {
    int head, begin, len;
};

// The box of a sequence's rows from `row` on and columns from `col` on.
struct Box {
    const CUtensorMap* map;
    int col, row, head, end;

    __device__ __forceinline__ Box(const SequenceMap& from, SequenceRows rows, int first_row, int first_col) {
        if (first_row < rows.len && first_col < from.dim) {
            map = &from.map;
            col = first_col, row = from.reach - rows.len + first_row;
            head = rows.head * from.head_step, end = rows.begin + rows.len;
        } else {
            map = &from.nothing;
            col = 0, row = 1, head = 0, end = 0;
        }
    }
};

// Starts the copy of rows [row, row + Tile::kRows) into a tile, from column `col` on; `barrier` gets Tile::kBytes, whatever
// is out of bounds. One thread calls it.
template <class Tile>
__device__ __forceinline__ void load_rows(Tile tile, uint32_t barrier, const SequenceMap& from, SequenceRows rows,
                                          int row, int col = 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        const Box box(from, rows, row, col + panel * Tile::kPanelCols);
        copy_box_in(tile.address + panel * Tile::kPanelBytes, barrier, *box.map, box.col, box.row, box.head, box.end);
    }
}

// Part `part` of kParts of the same, into the tiles of all kParts blocks of a cluster, whose barriers get their share of
// the bytes each. The map's boxes have Tile::kRows / kParts rows.
template <int kParts, class Tile>
__device__ __forceinline__ void load_part_of_rows(Tile tile, uint32_t barrier, const SequenceMap& from,
                                                  SequenceRows rows, int row, int part) {
    constexpr int kPartRows = Tile::kRows / kParts;
    if constexpr (kParts == 1) return load_rows(tile, barrier, from, rows, row);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        const Box box(from, rows, row + part * kPartRows, panel * Tile::kPanelCols);
        copy_box_in_to_all(tile.address + panel * Tile::kPanelBytes + part * kPartRows * Tile::kRowBytes, barrier,
                           *box.map, box.col, box.row, box.head, box.end, (1 << kParts) - 1);
    }
}

// Starts the copy of kRows of the tile's rows, from its row `tile_row` on, into rows [row, ...) of the sequence. The map's
// boxes have kRows rows. One thread calls it, after fence_async() by the writers and a barrier; it then commits.
template <int kRows, class Tile>
__device__ __forceinline__ void store_rows(Tile tile, int tile_row, const SequenceMap& to, SequenceRows rows, int row) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        if (panel * Tile::kPanelCols >= to.dim) break;
        copy_box_out(to.map, tile.address + panel * Tile::kPanelBytes + tile_row * Tile::kRowBytes,
                     panel * Tile::kPanelCols, to.reach - rows.len + row, rows.head, rows.begin + rows.len);
    }
}

#endif

}  // namespace hstu::attention::sm90
