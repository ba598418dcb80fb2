// How a tile of 16-bit elements lies in shared memory.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace hstu::attention {

// A [kRows, kDim] tile of 16-bit elements at a 128-byte aligned shared-memory address. Columns are cut into panels of
// 64 (or 32) that follow one another; within a panel the 16-byte chunks of a row are permuted by an exclusive or with
// the row number, so that ldmatrix and fragment stores meet no bank conflict.
template <int kRows_, int kDim_>
struct Tile {
    static constexpr int kRows = kRows_, kDim = kDim_;
    static constexpr int kPanelCols = kDim % 64 == 0 ? 64 : 32, kPanels = kDim / kPanelCols;
    static constexpr int kRowBytes = 2 * kPanelCols, kPanelBytes = kRows * kRowBytes, kBytes = kPanels * kPanelBytes;

    uint32_t address;  // in the shared window

    static HSTU_HOST_DEVICE int swizzle(int row) { return kPanelCols == 64 ? row & 7 : (row >> 1) & 3; }
    // Of the 16-byte chunk that holds columns [col, col + 8) of the first panel.
    static HSTU_HOST_DEVICE int chunk_offset(int row, int col) {
        return row * kRowBytes + ((col / 8 ^ swizzle(row)) << 4);
    }
};

}  // namespace hstu::attention
