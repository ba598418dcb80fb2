// Which row every row of an output is a copy of: the maps of the GPU kernels, and how outputs are cut into tiles.
//
// A map goes from an output to its sources, so each element is written once and by one thread whatever the offsets
// hold. Offsets on a GPU cannot be checked: what is computed from garbage is garbage, but a source that is not a row of
// its tensor is none. All of this runs on the host too, where tests/cpp/test_row_map.cpp has it do the copies of small
// problems.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "jagged/jagged.h"

namespace hstu::jagged {

// What one warp copies: rows of one output, or for long rows a range of columns of one row.
struct Tile {
    int part;            // of a split
    int rows, columns;   // units of a row
    int64_t first_row;   // of the output
    int64_t first_byte;  // of a row
};

// Rows are moved in units: what one load moves. A tile has whole rows, or columns of one row.
struct Tiling {
    static constexpr int kLeastUnits = 128, kMostUnits = 1024;  // of a tile

    int unit;     // bytes: 16, 8, 4, 2 or 1
    int rows;     // of a tile
    int columns;  // units of a row in a tile
    int64_t row_units;
    int64_t chunks;     // tiles that make up a row
    int64_t count = 0;  // tiles of all outputs

    // Tiles are small enough to give each of `warps` one, within their limits.
    Tiling(int unit, int64_t row_bytes, int64_t all_rows, int64_t warps) : unit(unit), row_units(row_bytes / unit) {
        const int64_t wide = max_of<int64_t>(row_units, 1);
        const int64_t share = ceil_div<int64_t>(all_rows * wide, warps * kLeastUnits) * kLeastUnits;
        const int64_t units = clamp_to<int64_t>(share, kLeastUnits, kMostUnits);
        columns = static_cast<int>(min_of(wide, units));
        rows = static_cast<int>(max_of<int64_t>(units / wide, 1));
        if (rows > 32) rows -= rows % 32;  // the lanes of a warp look up 32 rows at a time
        chunks = ceil_div<int64_t>(wide, columns);
        reciprocal_ = ceil_div(1u << kShift, static_cast<unsigned>(columns));
    }

    int64_t tiles_of(int64_t output_rows) const { return ceil_div<int64_t>(output_rows, rows) * chunks; }

    // Tile `index` of an output; none of its rows where the output has fewer tiles.
    HSTU_HOST_DEVICE Tile tile(int part, int64_t index, int64_t output_rows) const {
        const int64_t row_tile = chunks == 1 ? index : index / chunks;
        const int64_t first_unit = (index - row_tile * chunks) * columns;
        const int64_t first_row = row_tile * rows;
        return {part, static_cast<int>(clamp_to<int64_t>(output_rows - first_row, 0, rows)),
                static_cast<int>(min_of<int64_t>(columns, row_units - first_unit)), first_row, first_unit * unit};
    }

    // i / columns for 0 <= i < 2 kMostUnits: the row of unit i of a tile.
    HSTU_HOST_DEVICE int row_of_unit(int i) const {
        return static_cast<int>(static_cast<unsigned>(i) * reciprocal_ >> kShift);
    }

  private:
    static constexpr int kShift = 21;
    unsigned reciprocal_;
};

// Searches in boundaries that never decrease: at(i) for i < count. What is sought is the first beyond a row.

// A search by the 32 lanes of a warp in lockstep. Each looks at one boundary, probe(lane), and is told of how many lanes
// it is inside [low, high) and not beyond the row; 4,097 boundaries take three rounds.
struct WarpSearch {
    int64_t low, high;  // boundaries before low are not beyond the row, those from high on are

    HSTU_HOST_DEVICE bool is_done() const { return low >= high; }
    HSTU_HOST_DEVICE int64_t probe(int lane) const { return low + (lane + 1) * step() - 1; }
    HSTU_HOST_DEVICE void narrow(int not_beyond) {
        const int64_t width = step();
        low += not_beyond * width;
        high = min_of(high, low + width - 1);
    }

  private:
    HSTU_HOST_DEVICE int64_t step() const { return ceil_div<int64_t>(high - low + 1, 33); }
};

// A search by one thread that knows the boundaries before `low` not to be beyond the row. The answer is near in most
// cases, so it looks at low first, and then at twice the distance each time.
template <class Boundary>
HSTU_HOST_DEVICE int64_t first_beyond(const Boundary& at, int64_t low, int64_t count, int64_t row) {
    int64_t high = low;
    for (int64_t step = 1; high < count && at(high) <= row; step *= 2) {
        low = high + 1;
        high += step;
    }
    high = min_of(high, count);
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (at(middle) <= row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

HSTU_HOST_DEVICE char* row_of(const Rows& rows, int64_t i) {
    return i >= 0 && i < rows.count ? rows.data + i * rows.stride : nullptr;
}

// Maps have the type of the offsets as a parameter: a choice at every look would keep loads from being under way together.
template <class Offset>
HSTU_HOST_DEVICE int64_t offset_at(const IndexArray& offsets, int64_t b) {
    return static_cast<const Offset*>(offsets.data)[b];
}

template <class Offset>
HSTU_HOST_DEVICE int64_t clamped(const IndexArray& offsets, int64_t b, const Rows& rows) {
    return clamp_to<int64_t>(offset_at<Offset>(offsets, b), 0, rows.count);
}

// Sums and differences of offsets as they are: what overflows is garbage already.
HSTU_HOST_DEVICE int64_t wrapping_sum(int64_t a, int64_t b) {
    return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
HSTU_HOST_DEVICE int64_t wrapping_difference(int64_t a, int64_t b) {
    return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

// The parts of a join or split. With a few of them kernel parameters are small and quick to send, and what is summed
// over the parts is cheap enough to be computed wherever it is wanted.
constexpr int kFewParts = 4;

template <int kCapacity, class Offset>
struct Parts {
    int count;
    int64_t batch;
    Order order;
    Part at[kCapacity] = {};

    explicit Parts(const JoinParams& p) : count(p.part_count), batch(p.batch), order(p.order) {
        for (int i = 0; i < count; ++i) at[i] = p.parts[i];
    }

    HSTU_HOST_DEVICE int64_t begin(int p, int64_t b) const { return clamped<Offset>(at[p].offsets, b, at[p].rows); }
    HSTU_HOST_DEVICE int64_t length(int p, int64_t b) const {
        return max_of<int64_t>(begin(p, b + 1) - begin(p, b), 0);
    }

    // Where sequence b begins in the joined rows.
    HSTU_HOST_DEVICE int64_t joined_begin(int64_t b) const {
        int64_t sum = 0;
        if constexpr (kCapacity <= kFewParts) {
            int64_t of_part[kCapacity];  // all are loaded before one is used
            HSTU_UNROLL(kCapacity)
            for (int p = 0; p < kCapacity; ++p) of_part[p] = p < count ? offset_at<Offset>(at[p].offsets, b) : 0;
            HSTU_UNROLL(kCapacity)
            for (int p = 0; p < kCapacity; ++p) sum = wrapping_sum(sum, of_part[p]);
        } else {
            HSTU_UNROLL(4)
            for (int p = 0; p < count; ++p) sum = wrapping_sum(sum, offset_at<Offset>(at[p].offsets, b));
        }
        return sum;
    }

    // The joined row of row i of a part, which is one of sequence b.
    HSTU_HOST_DEVICE int64_t joined_row(int part, int64_t b, int64_t i) const {
        int64_t row = i;
        if (order == Order::kConcat) {
            for_each([&](int p) { row += p == part ? 0 : begin(p, b + (p < part)); });
            return row;
        }
        const int64_t t = i - begin(part, b);
        row = 0;
        for_each([&](int p) { row += begin(p, b) + min_of(length(p, b), t + (p < part)); });
        return row;
    }

    // The row of a part that is the `place`-th joined row of sequence b, or nullptr.
    HSTU_HOST_DEVICE const char* part_row(int64_t b, int64_t place) const {
        if (place < 0) return nullptr;
        return order == Order::kConcat ? concatenated(b, place) : interleaved(b, place);
    }

  private:
    template <class Body>
    HSTU_HOST_DEVICE void for_each(const Body& body) const {
        if constexpr (kCapacity <= kFewParts) {
            HSTU_UNROLL(1)
            for (int p = 0; p < count; ++p) body(p);
        } else {
            HSTU_UNROLL(4)
            for (int p = 0; p < count; ++p) body(p);
        }
    }

    HSTU_HOST_DEVICE const char* concatenated(int64_t b, int64_t place) const {
        const char* found = nullptr;
        for_each([&](int p) {
            const int64_t own = length(p, b);
            if (place >= 0 && place < own) found = row_of(at[p].rows, begin(p, b) + place);
            place -= own;
        });
        return found;
    }

    // Rounds before t have sum_p min(length_p, t) rows, which is concave in t: steps along its tangent, from below, come
    // to the round that has the row without passing it. Between two steps at least one part runs out, so they are few.
    HSTU_HOST_DEVICE const char* interleaved(int64_t b, int64_t place) const {
        int64_t t = place / count;
        for (;;) {
            int64_t before = 0;
            int active = 0;  // parts that have a row t
            for_each([&](int p) {
                const int64_t own = length(p, b);
                before += min_of(own, t);
                active += own > t;
            });
            if (active == 0) return nullptr;
            if (place - before < active) {
                place -= before;
                break;
            }
            t += (place - before) / active;
        }
        const char* found = nullptr;
        for_each([&](int p) {
            if (length(p, b) > t && place-- == 0) found = row_of(at[p].rows, begin(p, b) + t);
        });
        return found;
    }
};

// A map has, beside its tiling:
//   tile(index)                tile `index` of all outputs
//   boundaries(), at(tile, i)  where sequence i begins in the output; the last one is its end
//   from(tile, b, row)         what row of the output, one of sequence b, is a copy of; nullptr: it is filled
//   to(tile, row)              the row of the output

template <int kCapacity, class Offset>
struct JoinMap {
    // A few parts' offsets are added up wherever they are looked at, by the kernel that writes their sum. For more parts
    // a kernel before it writes the sum.
    static constexpr bool kWritesOffsets = kCapacity <= kFewParts;
    static constexpr int kOffsetsOfTile = 8 * 32;

    Tiling tiling;
    Parts<kCapacity, Offset> parts;
    Rows joined;
    Offset* joined_offsets;
    uint64_t fill = 0;

    JoinMap(const JoinParams& p, const Tiling& tiles)
        : tiling(tiles), parts(p), joined(p.joined), joined_offsets(static_cast<Offset*>(p.joined_offsets)) {
        tiling.count = tiling.tiles_of(joined.count);
        if (kWritesOffsets) tiling.count = max_of(tiling.count, ceil_div<int64_t>(p.batch + 1, kOffsetsOfTile));
    }

    HSTU_HOST_DEVICE Tile tile(int64_t index) const { return tiling.tile(0, index, joined.count); }
    HSTU_HOST_DEVICE int64_t boundaries() const { return parts.batch + 1; }
    HSTU_HOST_DEVICE int64_t at(const Tile&, int64_t b) const {
        return kWritesOffsets ? parts.joined_begin(b) : joined_offsets[b];
    }
    HSTU_HOST_DEVICE const char* from(const Tile& tile, int64_t b, int64_t row) const {
        return b >= 0 && b < parts.batch ? parts.part_row(b, wrapping_difference(row, at(tile, b))) : nullptr;
    }
    HSTU_HOST_DEVICE char* to(const Tile&, int64_t row) const { return joined.data + row * joined.stride; }

    // The share of thread `first` of `step`.
    HSTU_HOST_DEVICE void write_offsets(int64_t first, int64_t step) const {
        for (int64_t b = first; b <= parts.batch; b += step)
            joined_offsets[b] = static_cast<Offset>(parts.joined_begin(b));
    }
};

template <int kCapacity, class Offset>
struct SplitMap {
    static constexpr bool kWritesOffsets = false;

    Tiling tiling;
    Parts<kCapacity, Offset> parts;
    Rows joined;
    uint64_t fill = 0;
    int64_t first_tile[kCapacity];  // of every part

    SplitMap(const JoinParams& p, const Tiling& tiles) : tiling(tiles), parts(p), joined(p.joined) {
        for (int i = 0; i < p.part_count; ++i) {
            first_tile[i] = tiling.count;
            tiling.count += tiling.tiles_of(p.parts[i].rows.count);
        }
    }

    HSTU_HOST_DEVICE Tile tile(int64_t index) const {
        const int64_t beyond = first_beyond([&](int64_t p) { return first_tile[p]; }, 0, parts.count, index);
        const int part = static_cast<int>(beyond) - 1;
        return tiling.tile(part, index - first_tile[part], parts.at[part].rows.count);
    }
    HSTU_HOST_DEVICE int64_t boundaries() const { return parts.batch + 1; }
    HSTU_HOST_DEVICE int64_t at(const Tile& tile, int64_t b) const {
        return offset_at<Offset>(parts.at[tile.part].offsets, b);
    }
    HSTU_HOST_DEVICE const char* from(const Tile& tile, int64_t b, int64_t row) const {
        return b >= 0 && b < parts.batch ? row_of(joined, parts.joined_row(tile.part, b, row)) : nullptr;
    }
    HSTU_HOST_DEVICE char* to(const Tile& tile, int64_t row) const {
        const Rows& rows = parts.at[tile.part].rows;
        return rows.data + row * rows.stride;
    }
};

// Rows (b, t) in that order: their sequences need no search.
template <class Offset>
struct ToDenseMap {
    static constexpr bool kWritesOffsets = false;

    Tiling tiling;
    DenseParams p;
    uint64_t fill;

    ToDenseMap(const DenseParams& params, const Tiling& tiles) : tiling(tiles), p(params), fill(params.padding) {
        tiling.count = tiling.tiles_of(p.batch * p.max_len);
    }

    HSTU_HOST_DEVICE Tile tile(int64_t index) const { return tiling.tile(0, index, p.batch * p.max_len); }
    HSTU_HOST_DEVICE int64_t boundaries() const { return 0; }
    HSTU_HOST_DEVICE int64_t at(const Tile&, int64_t) const { return 0; }
    HSTU_HOST_DEVICE const char* from(const Tile&, int64_t, int64_t row) const {
        const int64_t b = row / p.max_len, t = row - b * p.max_len;
        const int64_t begin = clamped<Offset>(p.offsets, b, p.jagged),
                      end = clamped<Offset>(p.offsets, b + 1, p.jagged);
        return t < end - begin ? row_of(p.jagged, begin + t) : nullptr;
    }
    HSTU_HOST_DEVICE char* to(const Tile&, int64_t row) const {
        const int64_t b = row / p.max_len, t = row - b * p.max_len;
        return p.dense + b * p.batch_stride + t * p.dense_stride;
    }
};

template <class Offset>
struct ToJaggedMap {
    static constexpr bool kWritesOffsets = false;

    Tiling tiling;
    DenseParams p;
    uint64_t fill = 0;

    ToJaggedMap(const DenseParams& params, const Tiling& tiles) : tiling(tiles), p(params) {
        tiling.count = tiling.tiles_of(p.jagged.count);
    }

    HSTU_HOST_DEVICE Tile tile(int64_t index) const { return tiling.tile(0, index, p.jagged.count); }
    HSTU_HOST_DEVICE int64_t boundaries() const { return p.batch + 1; }
    HSTU_HOST_DEVICE int64_t at(const Tile&, int64_t b) const { return offset_at<Offset>(p.offsets, b); }
    HSTU_HOST_DEVICE const char* from(const Tile& tile, int64_t b, int64_t row) const {
        const int64_t t = b >= 0 && b < p.batch ? wrapping_difference(row, at(tile, b)) : -1;
        return t >= 0 && t < p.max_len ? p.dense + b * p.batch_stride + t * p.dense_stride : nullptr;
    }
    HSTU_HOST_DEVICE char* to(const Tile&, int64_t row) const { return p.jagged.data + row * p.jagged.stride; }
};

}  // namespace hstu::jagged
