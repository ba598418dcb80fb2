// In the place of csrc/attention/sm90/tensor_map.h: the same bounds of a sequence, without a driver.
#pragma once

#include <stdexcept>

#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"

namespace hstu::attention::sm90 {

struct SequenceMap {
    Jagged tensor;
    int64_t rows;
    int heads, dim, max_length, box_rows, panel, panels;

    template <class T>
    static SequenceMap make(const Jagged& x, int64_t rows, int heads, int dim, int max_length, int box_rows, int panel,
                            int panels) {
        if (box_rows > 256) emulated::fail("a TMA box has at most 256 rows");
        return {x, rows, heads, dim, max_length, box_rows, panel, panels};
    }
};

struct SequenceRows {
    int head, begin, len;
};

// copy(shared, global) for each 16 bytes of rows [row, row + Tile::kRows); global is nullptr where out of bounds.
template <class Tile, class Copy>
void for_each_chunk(Tile tile, const SequenceMap& map, SequenceRows rows, int row, const Copy& copy,
                    unsigned char* memory = emulated::shared_window, int first_col = 0) {
    if (map.box_rows != Tile::kRows || map.panel != Tile::kPanelCols || map.panels != Tile::kPanels)
        emulated::fail("a tile unlike the map's box");
    if (rows.len > map.max_length || rows.begin + rows.len > map.rows || rows.head >= map.heads)
        emulated::fail("rows outside the map");
    if (tile.address % 1024 != 0 || tile.address + Tile::kBytes > emulated::kSharedBytes)
        emulated::fail("a tile at a wrong place");
    for (int r = 0; r < Tile::kRows; ++r)
        for (int col = 0; col < Tile::kDim; col += 8) {
            const bool inside = row + r >= 0 && row + r < rows.len && first_col + col < map.dim;
            bf16* global = inside ? map.tensor.at<bf16>(rows.begin + row + r, rows.head) + first_col + col : nullptr;
            copy(memory + tile.address + col / Tile::kPanelCols * Tile::kPanelBytes +
                     Tile::chunk_offset(r, col % Tile::kPanelCols),
                 global);
        }
}

inline void copy_chunk(unsigned char* shared, const bf16* global) {
    if (global)
        std::memcpy(shared, global, 16);
    else
        std::memset(shared, 0, 16);
}

constexpr uint64_t kReadOnce = 0;

template <class Tile, int kBlocks = 1>
struct RowsIn {
    SequenceMap from;
    SequenceRows rows;
    int row, col;

    RowsIn(const SequenceMap& from, SequenceRows rows, int row, int col = 0)
        : from(from), rows(rows), row(row), col(col) {}
    void start(Tile tile, uint32_t barrier) const {
        for (int i = 0; i < kBlocks; ++i)
            emulated::block->copies.push_back([=, *this] {
                emulated::Block& to = kBlocks == 1 ? *emulated::block : emulated::neighbour(i);
                for_each_chunk(tile, from, rows, row, copy_chunk, emulated::memory_of(to), col);
                Barrier{barrier}.complete(Tile::kBytes, to);
            });
    }
};

template <class Tile>
void load_rows(Tile tile, uint32_t barrier, const SequenceMap& from, SequenceRows rows, int row, int col = 0,
               uint64_t = 0) {
    RowsIn<Tile>(from, rows, row, col).start(tile, barrier);
}

template <class Tile>
void prefetch_rows(const SequenceMap&, SequenceRows, int) {}

template <int kRows, class Tile>
void store_rows(Tile tile, int tile_row, const SequenceMap& to, SequenceRows rows, int row) {
    if (tile_row != 0 || kRows != Tile::kRows) emulated::fail("only whole tiles are stored here");
    emulated::Fiber* const fiber = &emulated::fiber();
    ++fiber->copies_out;
    emulated::block->copies.push_back([=] {
        for_each_chunk(tile, to, rows, row, [](const unsigned char* shared, bf16* global) {
            if (global) std::memcpy(global, shared, 16);
        });
        --fiber->copies_out;
    });
}
inline void commit_copies_out() {}
template <int kPending>
void wait_copies_out() {
    static_assert(kPending == 0);
    emulated::Fiber* const fiber = &emulated::fiber();
    emulated::wait_until("stores", [fiber] { return fiber->copies_out == 0; });
}
template <int kPending>
void wait_copies_out_read() {
    wait_copies_out<kPending>();
}

}  // namespace hstu::attention::sm90
