// The relative bias of a tile, and the sums of its gradient by distance and by bucket.
//
// A tile is [key, query row] as the scores are, so a key's row of it runs along consecutive entries of the position table.
// Rows of one key mostly fall into few time buckets: the last bucket's bounds are tried before it is looked up.
#pragma once

#include "attention/bias.h"
#include "attention/cpu/tile.h"
#include "attention/time_bucket.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

template <class C>
struct RelativePanel {
    C* values;         // [kBlockK, kBlockQ], nullptr where there is no relative bias
    uint8_t* buckets;  // [kBlockK, kBlockQ], with a time table

    RelativePanel(Arena& arena, const Params& p)
        : values(p.relative ? arena.take<C>(kBlockK * kBlockQ) : nullptr),
          buckets(p.relative.time ? arena.take<uint8_t>(kBlockK * kBlockQ) : nullptr) {}

    const C* row(int key) const { return values == nullptr ? nullptr : values + key * kBlockQ; }
};

// to[row] = the position table at distance first + row, clipped.
template <class C>
static void pack_positions(const RelativeBias<C>& bias, int first, int rows, C* to) {
    const int below = clamp_to(-bias.reach - first, 0, rows), inside = clamp_to(bias.reach + 1 - first, below, rows);
    for (int row = 0; row < below; ++row) to[row] = bias.position[-bias.reach];
    for (int row = below; row < inside; ++row) to[row] = bias.position[first + row];
    for (int row = inside; row < rows; ++row) to[row] = bias.position[bias.reach];
}

template <class C>
static void pack_relative(const RelativeBias<C>& bias, const Tile& tile, RelativePanel<C>& panel) {
    for (int key = 0; key < tile.cols; ++key) {
        C* to = panel.values + key * kBlockQ;
        if (bias.position != nullptr)
            pack_positions(bias, tile.row0 + bias.offset - tile.col0 - key, tile.rows, to);
        else
            fill_zero(to, tile.rows);
        fill_zero(to + tile.rows, kBlockQ - tile.rows);
        if (bias.time == nullptr) continue;
        uint8_t* buckets = panel.buckets + key * kBlockQ;
        const int64_t key_time = bias.key_times[tile.col0 + key];
        int bucket = 0;
        uint64_t begin = 1, end = 0;  // differences in [begin, end) are in this bucket
        for (int row = 0; row < tile.rows; ++row) {
            const uint64_t x = time_difference(bias.query_times[tile.row0 + row], key_time);
            if (x < begin || x >= end) {
                bucket = time_bucket(x);
                begin = kTimeEdges[bucket];
                end = bucket + 1 < kTimeBuckets ? kTimeEdges[bucket + 1] : ~uint64_t{0};
                bucket = min_of(bucket, bias.num_buckets);
            }
            buckets[row] = static_cast<uint8_t>(bucket);
            to[row] += bias.time[bucket];
        }
    }
}

// What one item adds to the gradients of the tables: by distance, unclipped, and by bucket.
template <class C>
struct TablePartial {
    C* position;  // [len_q + len_k]: entry i is distance offset - (len_k - 1) + i; nullptr where not wanted
    C* time;      // [num_buckets + 1]

    TablePartial(const BackwardParams& p, const Sequence& s, void* memory) {
        C* next = static_cast<C*>(memory);
        position = memory != nullptr && p.dposition ? next : nullptr;
        if (position != nullptr) next += int64_t{s.len_q} + s.len_k;
        time = memory != nullptr && p.dtime ? next : nullptr;
        if (position != nullptr) fill_zero(position, int64_t{s.len_q} + s.len_k);
        if (time != nullptr) fill_zero(time, int64_t{p.relative.num_buckets} + 1);
    }
};

// grad [kBlockK, kBlockQ]: G^T, 0 where masked.
template <class C>
static void add_table_gradients(const Tile& tile, int len_k, const C* grad, const uint8_t* buckets,
                                const TablePartial<C>& partial) {
    for (int key = 0; key < tile.cols; ++key, grad += kBlockQ) {
        if (partial.position != nullptr) {
            C* to = partial.position + tile.row0 - tile.col0 - key + len_k - 1;
            for (int row = 0; row < tile.rows; ++row) to[row] += grad[row];
        }
        if (partial.time != nullptr)
            for (int row = 0; row < tile.rows; ++row) partial.time[buckets[key * kBlockQ + row]] += grad[row];
    }
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
