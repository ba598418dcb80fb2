// Copies between packed [rows, heads, dim] tensors and shared memory by TMA, with the bounds of one sequence.
//
// Rows behind a sequence's last one must read as 0 (0 * NaN would reach the result) and must not be written, and TMA
// knows only the bounds of the whole tensor. So the map has a row dimension of `reach` (at least the longest sequence)
// and a fourth dimension whose stride is one row again. Row r of a sequence that starts at packed row `begin` with `len`
// rows has the coordinates
//     (column, reach - len + r, head, begin + len, 0)
// and, as the map starts `reach` rows before the tensor, the address of packed row begin + r; r >= len is out of bounds.
// A box that is out of bounds altogether still touches the memory where its map starts, which may not be the tensor's:
// such boxes go through a map of their own.
// Where the columns fill whole panels, the last dimension counts panels, and one box brings all panels of a tile.
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

// TMA copies of boxes of `box_rows` rows and one panel or all (64 columns: 128-byte swizzle, 32: 64-byte swizzle), one head.
struct SequenceMap {
    CUtensorMap map;
    CUtensorMap nothing;  // starts at the tensor; (0, 1, 0, 0, 0) is out of bounds
    int dim, reach;
    int panels;     // of a box
    int head_step;  // 0 where all heads are one (expanded): stride 0 is no TMA stride

    // dim: columns of the tensor; those behind it read as 0 too. rows: packed rows. max_length: no sequence is longer.
    // panels: of a tile.
    template <class T>
    static SequenceMap make(const Jagged& x, int64_t rows, int heads, int dim, int max_length, int box_rows, int panel,
                            int panels) {
        SequenceMap result{};
        if (rows == 0) return result;  // nothing will be copied
        result.dim = dim;
        result.reach = max_of(1, max_length);
        result.head_step = x.head_stride != 0;
        const uint64_t row_bytes = max_of<int64_t>(16, 2 * x.row_stride);
        const uint64_t head_bytes = max_of<int64_t>(16, 2 * x.head_stride);
        const bool whole = dim % panel == 0;
        result.panels = whole ? panels : 1;
        char* const start = static_cast<char*>(x.data);
        const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
        encode<T>(result.map, start - result.reach * row_bytes,
                  {size(whole ? panel : dim), size(result.reach), size(max_of(1, heads)), size(rows + 1),
                   size(whole ? dim / panel : 1)},
                  {row_bytes, head_bytes, row_bytes, size(2 * panel)}, box_rows, panel, result.panels);
        encode<T>(result.nothing, start, {8, 1, 1, 1, 1}, {16, 16, 16, 16}, box_rows, panel, result.panels);
        return result;
    }

  private:
    template <class T>
    static void encode(CUtensorMap& map, void* start, const std::array<cuuint64_t, 5>& dims,
                       const std::array<cuuint64_t, 4>& strides, int box_rows, int panel, int panels) {
        const cuuint32_t box[] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box_rows), 1, 1,
                                  static_cast<cuuint32_t>(panels)};
        const cuuint32_t steps[] = {1, 1, 1, 1, 1};
        const auto run = [&] {
            return tensor_map_encoder()(
                &map,
                std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                5, start, dims.data(), strides.data(), box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
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

// One head's rows of one sequence, seen through a map.
struct SequenceRows {
    int head, begin, len;
};

// How long the L2 cache shall keep what a copy brings in, in the code of createpolicy.
constexpr uint64_t kKeepAsUsual = 0x1000000000000000, kReadOnce = 0x12f0000000000000;

// The box of a sequence's rows from `row` on and columns from `first_col`, where a panel of kPanelCols starts, on.
template <int kPanelCols>
struct Box {
    const CUtensorMap* map;
    int col, row, head, end, panel;

    __device__ __forceinline__ Box(const SequenceMap& from, SequenceRows rows, int first_row, int first_col) {
        if (first_row < rows.len && first_col < from.dim) {
            const bool whole = from.dim % kPanelCols == 0;
            map = &from.map;
            col = whole ? 0 : first_col, panel = whole ? first_col / kPanelCols : 0;
            row = from.reach - rows.len + first_row;
            head = rows.head * from.head_step, end = rows.begin + rows.len;
        } else {
            map = &from.nothing;
            col = 0, row = 1, head = 0, end = 0, panel = 0;
        }
    }
    __device__ __forceinline__ void copy_in(uint32_t to, uint32_t barrier, uint64_t keep) const {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
            "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(end), "r"(panel), "l"(keep)
            : "memory");
    }
    // The same to all blocks of the cluster in `mask`, each at its own `to` and `barrier`.
    __device__ __forceinline__ void copy_in_to_all(uint32_t to, uint32_t barrier, uint16_t mask) const {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
            "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(end), "r"(panel), "h"(mask)
            : "memory");
    }
    // Into the L2 cache.
    __device__ __forceinline__ void prefetch() const {
        asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(col),
                     "r"(row), "r"(head), "r"(end), "r"(panel)
                     : "memory");
    }
    __device__ __forceinline__ void copy_out(uint32_t from) const {
        asm volatile(
            "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
            "r"(from), "r"(col), "r"(row), "r"(head), "r"(end), "r"(panel)
            : "memory");
    }
};

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

// Copies of rows [row, row + Tile::kRows), from column `col` on, into a tile and, with kBlocks, into the same tile of all
// blocks of the cluster. `barrier`, of each block, gets Tile::kBytes, whatever is out of bounds. One thread calls it.
template <class Tile, int kBlocks = 1>
struct RowsIn {
    const SequenceMap& from;
    SequenceRows rows;
    int row, col;
    Box<Tile::kPanelCols> first;  // computed before the tile is free

    __device__ __forceinline__ RowsIn(const SequenceMap& from, SequenceRows rows, int row, int col = 0)
        : from(from), rows(rows), row(row), col(col), first(from, rows, row, col) {}
    __device__ __forceinline__ void start(Tile tile, uint32_t barrier, uint64_t keep = kKeepAsUsual) const {
        copy(first, tile.address, barrier, keep);
        for (int panel = from.panels; panel < Tile::kPanels; panel += from.panels)
            copy({from, rows, row, col + panel * Tile::kPanelCols}, tile.address + panel * Tile::kPanelBytes, barrier,
                 keep);
    }

  private:
    static __device__ __forceinline__ void copy(const Box<Tile::kPanelCols>& box, uint32_t to, uint32_t barrier,
                                                uint64_t keep) {
        if constexpr (kBlocks == 1)
            box.copy_in(to, barrier, keep);
        else
            box.copy_in_to_all(to, barrier, (1 << kBlocks) - 1);
    }
};

template <class Tile>
__device__ __forceinline__ void load_rows(Tile tile, uint32_t barrier, const SequenceMap& from, SequenceRows rows,
                                          int row, int col = 0, uint64_t keep = kKeepAsUsual) {
    RowsIn<Tile>(from, rows, row, col).start(tile, barrier, keep);
}

// Fetches the same rows into the L2 cache, ahead of load_rows().
template <class Tile>
__device__ __forceinline__ void prefetch_rows(const SequenceMap& from, SequenceRows rows, int row) {
    if (row >= rows.len) return;
    for (int panel = 0; panel < Tile::kPanels && panel * Tile::kPanelCols < from.dim; panel += from.panels)
        Box<Tile::kPanelCols>(from, rows, row, panel * Tile::kPanelCols).prefetch();
}

// Starts the copy of kRows of the tile's rows, from its row `tile_row` on, into rows [row, ...) of the sequence. The map's
// boxes have kRows rows. One thread calls it, after fence_async() by the writers and a barrier; it then commits.
template <int kRows, class Tile>
__device__ __forceinline__ void store_rows(Tile tile, int tile_row, const SequenceMap& to, SequenceRows rows, int row) {
    for (int panel = 0; panel < Tile::kPanels && panel * Tile::kPanelCols < to.dim; panel += to.panels)
        Box<Tile::kPanelCols>(to, rows, row, panel * Tile::kPanelCols)
            .copy_out(tile.address + panel * Tile::kPanelBytes + tile_row * Tile::kRowBytes);
}

#endif

}  // namespace hstu::attention::sm90
