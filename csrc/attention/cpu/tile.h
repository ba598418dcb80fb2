// Which elements of a tile are kept, and the ranges of rows and keys that the products of the tile need.
//
// A tile is kBlockQ query rows by kBlockK keys, held transposed, [key, query row], so that a vector runs over query rows.
// Products go by groups of kGroup keys or query rows; a group's range is the part of the tile outside of which the group
// keeps nothing, so that tiles on the diagonal cost little more than their kept half.
#pragma once

#include "attention/cpu/panel.h"
#include "attention/mask.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

static_assert(kBlockQ == 64 && kBlockK == 64, "a tile's row and column of the mask is one 64-bit word");

// Bits [begin, end), clipped to a word.
HSTU_CPU_INLINE uint64_t span_bits(int begin, int end) {
    const int from = clamp_to(begin, 0, 64), to = clamp_to(end, from, 64);
    const uint64_t ones = to - from == 64 ? ~uint64_t{0} : (uint64_t{1} << (to - from)) - 1;
    return from == 64 ? 0 : ones << from;
}

// The keys col0 + j, j < 64, that a query row keeps, as bit j.
HSTU_CPU_INLINE uint64_t kept_bits(const WindowMask::Row& row, int col0) {
    return span_bits(row.begin - col0, row.end - col0);
}
HSTU_CPU_INLINE uint64_t kept_bits(const TargetMask::Row& row, int col0) {
    return span_bits(-col0, row.end - col0) | span_bits(row.group_begin - col0, row.group_end - col0);
}
HSTU_CPU_INLINE uint64_t kept_bits(const IntervalMask::Row& row, int col0) {
    const auto relative = [&](int64_t m) { return clamp_to(row.func[m * row.stride], 0, row.len_k) - col0; };
    uint64_t bits = span_bits(-col0, relative(0));
    for (int m = 1; m + 1 < row.count; m += 2) bits |= span_bits(relative(m), relative(m + 1));
    return bits;
}

constexpr int kGroups = (kBlockQ + kGroup - 1) / kGroup;

struct Tile {
    int row0, rows, col0, cols;
    bool full;
    uint64_t queries[kBlockK];    // per key: the query rows that keep it
    Span group_queries[kGroups];  // per group of keys: a range of query rows
    Span group_keys[kGroups];     // per group of query rows: a range of keys

    template <class Mask>
    Tile(const Mask& mask, int row0, int rows, int col0, int cols)
        : row0(row0), rows(rows), col0(col0), cols(cols), full(mask.is_full(row0, rows, col0, cols)) {
        if (full) {
            for (int g = 0; g < kGroups; ++g) group_queries[g] = {0, rows}, group_keys[g] = {0, cols};
            return;
        }
        uint64_t keys[kBlockQ];
        for (int i = 0; i < rows; ++i) keys[i] = kept_bits(mask.row(row0 + i), col0) & span_bits(0, cols);
        transpose_bits(keys);
        for (int g = 0; g < kGroups; ++g) {
            group_keys[g] = hull(keys, g * kGroup, min_of((g + 1) * kGroup, rows));
            group_queries[g] = hull(queries, g * kGroup, min_of((g + 1) * kGroup, cols));
        }
    }

  private:
    // A row's word changes value at few keys; toggling there and running over the keys gives the columns' words.
    void transpose_bits(const uint64_t* keys) {
        uint64_t toggles[kBlockK] = {};
        for (int i = 0; i < rows; ++i)
            for (uint64_t edges = keys[i] ^ (keys[i] << 1); edges != 0; edges &= edges - 1)
                toggles[__builtin_ctzll(edges)] ^= uint64_t{1} << i;
        uint64_t current = 0;
        for (int j = 0; j < cols; ++j) queries[j] = current ^= toggles[j];
    }

    static Span hull(const uint64_t* words, int begin, int end) {
        uint64_t any = 0;
        for (int i = begin; i < end; ++i) any |= words[i];
        return any == 0 ? Span{0, 0} : Span{__builtin_ctzll(any), 64 - __builtin_clzll(any)};
    }
};

// Calls body(tile) for every tile of the query rows that may keep something.
template <class Mask, class Body>
static void for_each_tile(const Mask& mask, int row0, int rows, const Body& body) {
    const Spans spans = mask.kv_range(row0, rows);
    const Span both[] = {spans.first, spans.second};
    for (const Span& span : both)
        for (int col = span.begin; col < span.end; col += kBlockK)
            body(Tile(mask, row0, rows, col, min_of(kBlockK, span.end - col)));
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
