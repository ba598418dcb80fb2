// The relative bias on tiles of scores, prepared by warps that do nothing else.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// The two parts reach the consumers' accumulators on different ways, in fp32, divided by alpha where scores begin with them:
//   positions   a window a tile in shared memory, from the last row and first column to the first row and last column;
//               blocks of 8 x 8 on the same diagonal share a pair of its values a thread (WindowReader)
//   times       of pieces of 16 rows and 32 columns, by the buckets that can occur there (PieceTimes): of one bucket a
//               constant; a few edges between buckets, where all rows are later than all columns or all earlier, are
//               compared by the consumers, an integer a column; else all values, positions included, in the order of the
//               accumulators
// BiasWarps, a warpgroup, writes windows, tables and values and finds out which buckets can occur, from the ranges of the
// times on both sides, one lane a piece. Values are a look-up of a difference's quarter of an octave (time_bucket.h) in
// shared memory, an edge and the values on its sides. Integers are counted from the piece's first column, modulo 2^32, and
// serve below 2^30; differences in fp32 are exact below 2^24; all others are taken in 64 bits.
// Warp w of the bias warps has rows [16 w, 16 w + 16) of each group of 64 rows, as warp w of the warpgroup that owns the
// group.
#pragma once

#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"
#include "attention/time_lookup.h"

namespace hstu::attention::sm90 {

// One head's tables and one sequence's times.
struct RelativeSides {
    const float* position;  // at distance 0; may be nullptr
    const float* time;      // may be nullptr
    int reach, num_buckets, offset;
    int len_q, len_k;
    const int64_t *query_times, *key_times;

    __device__ __forceinline__ RelativeSides(const Relative& r, int head, int64_t q_begin, int64_t k_begin, int len_q,
                                             int len_k)
        : position(r.position ? static_cast<const float*>(r.position) + head * r.position_head_stride + r.reach
                              : nullptr),
          time(r.time ? static_cast<const float*>(r.time) + head * r.time_head_stride : nullptr), reach(r.reach),
          num_buckets(r.num_buckets), offset(len_k - len_q), len_q(len_q), len_k(len_k),
          query_times(r.query_times + q_begin), key_times(r.key_times + k_begin) {}
};

constexpr int kPieceCols = 32;

// What is known of the times of a piece.
struct PieceTimes {
    static constexpr int kMostEdges = 3;
    static constexpr int kLookUp = 1 << 12, kWide = 2 << 12, kEarlier = 1 << 14;
    static constexpr int kValues = kLookUp | kWide;  // bias warps write them, from differences in fp32 or in 64 bits

    int code;

    __device__ __forceinline__ int bucket() const { return code & 255; }     // the first that can occur
    __device__ __forceinline__ int edges() const { return code >> 8 & 15; }  // above it, for the consumers to compare
    __device__ __forceinline__ bool has_values() const { return code & kValues; }
    __device__ __forceinline__ bool is_earlier() const { return code & kEarlier; }  // rows than columns
};

// kGroups groups of 64 rows; tiles of kCols columns, kTiles at a time; works, kPlaces at a time.
template <int kGroups_, int kCols_, int kPlaces, int kTiles_>
struct BiasShared {
    static constexpr int kGroups = kGroups_, kCols = kCols_, kTiles = kTiles_, kPieces = kCols / kPieceCols;
    static constexpr int kQuarters = 4 * 24;  // of differences below 2^24
    static constexpr int kRows = 64 * kGroups, kWindow = kRows + kCols;

    struct alignas(16) Bucket {
        float half;         // of the table's entry
        float value, step;  // the entry and the step to the next one over alpha
        uint32_t edge;      // to the next bucket
    };
    struct alignas(16) Quarter {
        float edge, below, above;  // the entries over alpha
    };
    struct Place {
        Bucket buckets[kTimeBuckets];
        Quarter quarters[kQuarters];
        uint32_t row_words[kRows];  // the low halves of the rows' times
    };
    struct Tile {
        // The position bias over alpha: [kRows - 1 - row + column], and the same a word later, so that the pair of any two
        // neighbours is aligned in one of them; half of the banks apart.
        alignas(16) float window[2][kWindow + 16];
        // Of each piece's columns, counted from its first; and that first as the low half of an integer.
        alignas(8) int near[kCols];
        alignas(8) float near_float[kCols];
        alignas(4 * kPieces) int pieces[4 * kGroups][kPieces];  // PieceTimes by rows / 16
        alignas(4 * kPieces) uint32_t bases[kPieces];
        float2 ranges[kPieces];  // of the columns' times, counted from the block's first row
    };

    Place places[kPlaces];
    Tile tiles[kTiles];
};

// A thread's way to its pairs of positions: pair(n) is of row lane / 4 of the warp's and columns 8 n + lane % 4 * 2 and the
// next; pair(n - 1) is of the row 8 below.
template <class Shared>
struct WindowReader {
    const float* from;

    __device__ __forceinline__ WindowReader(const typename Shared::Tile& tile, int group) {
        const int row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane() / 4;
        const int place = Shared::kRows - 1 - row + lane() % 4 * 2;
        from = tile.window[place % 2] + place + place % 2;
    }
    __device__ __forceinline__ float2 pair(int n) const { return *reinterpret_cast<const float2*>(from + n * 8); }
};

// The alpha that the bias is divided by: where the true one is next to nothing, so small that it makes no difference.
__device__ __forceinline__ float divisor_of(float alpha) {
    return fabsf(alpha) < 0x1p-60f ? copysignf(0x1p-60f, alpha) : alpha;
}

// A time counted from a base: exact below 2^24, else off by at most 1 + 2^-23 of itself.
__device__ __forceinline__ float time_from(int64_t base, int64_t t) {
    const float about = 2.0f * __ll2float_rn((t >> 1) - (base >> 1));
    return fabsf(about) < 0x1p24f - 4.0f
               ? static_cast<float>(static_cast<int>(static_cast<uint32_t>(t) - static_cast<uint32_t>(base)))
               : about;
}

template <class Shared>
class BiasWarps {
  public:
    using Place = typename Shared::Place;
    using Tile = typename Shared::Tile;

    __device__ __forceinline__ explicit BiasWarps(float alpha) : factor(1.0f / divisor_of(alpha)) {}

    // This thread's share of the time tables.
    __device__ __forceinline__ void write_tables(const RelativeSides& sides, Place& place) const {
        const auto entry = [&](int b) { return sides.time ? __ldg(sides.time + min_of(b, sides.num_buckets)) : 0.0f; };
        const int thread = threadIdx.x % kWarpgroup;
        for (int b = thread; b < kTimeBuckets; b += kWarpgroup) {
            const float here = entry(b), step = entry(b + 1) - here;
            place.buckets[b] = {0.5f * here, factor * here, factor * step,
                                kEdgesOfTime.at[min_of(b + 1, kTimeBuckets - 1)]};
        }
        if (thread < Shared::kQuarters) {
            const TimeQuarter& quarter = kQuartersOfTime.at[thread];
            place.quarters[thread] = {static_cast<float>(quarter.edge_low), factor * entry(quarter.bucket),
                                      factor * entry(quarter.bucket + 1)};
        }
    }

    // The group whose rows, and the piece of columns, that this lane looks after; lanes from kLanes on after none.
    static constexpr int kPieces = Shared::kPieces, kLanes = Shared::kGroups * kPieces;
    static __device__ __forceinline__ int group_of_lane() { return min_of(lane() / kPieces, Shared::kGroups - 1); }
    static __device__ __forceinline__ int piece_of_lane() { return lane() % kPieces; }

    // Rows from row0 on, and the columns that this warp's rows of this lane's group need. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const RelativeSides& sides, int row0, const Spans& wanted_, int col0,
                                                Place& place) {
        wanted = wanted_;
        positions = sides.position, reach = sides.reach, first = row0 + sides.offset;
        has_times = sides.time != nullptr, key_times = sides.key_times;
        len_k = sides.len_k, num_buckets = sides.num_buckets;
        read_ahead(col0);
        if (!has_times) return;
        base = __ldg(sides.query_times + min_of(row0, sides.len_q - 1));
#pragma unroll
        for (int i = 0; i < Shared::kGroups; i += 2) {
            // 16 lanes a group.
            const int group = min_of(i + lane() / 16, Shared::kGroups - 1);
            const int row = 64 * group + 16 * warp() + lane() % 16;
            const int64_t time = __ldg(sides.query_times + min_of(row0 + row, sides.len_q - 1));
            place.row_words[row] = static_cast<uint32_t>(time);
            const float t = time_from(base, time);
            float low = t, high = t;
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                low = fminf(low, __shfl_xor_sync(0xffffffff, low, step));
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, step));
            }
            const int from = 16 * (group_of_lane() - i);
            low = __shfl_sync(0xffffffff, low, from), high = __shfl_sync(0xffffffff, high, from);
            if (from == 0 || from == 16) rows = {low, high};
        }
    }
    // A tile's windows and columns. next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void write_tile(Tile& tile, int next) {
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            const int place = threadIdx.x % kWarpgroup + i * kWarpgroup;
            if (place < Shared::kWindow) tile.window[0][place] = tile.window[1][place + 1] = factor * position[i];
        }
        if (has_times && warp() < kPieces) {
            const int order = ordered(time_from(base, col_time));
            const int low = __reduce_min_sync(0xffffffff, order), high = __reduce_max_sync(0xffffffff, order);
            const uint32_t word = static_cast<uint32_t>(col_time), first_word = __shfl_sync(0xffffffff, word, 0);
            const int near = static_cast<int>(word - first_word), place = warp() * kPieceCols + lane();
            tile.near[place] = near, tile.near_float[place] = static_cast<float>(near);
            if (lane() == 0)
                tile.bases[warp()] = first_word, tile.ranges[warp()] = {from_ordered(low), from_ordered(high)};
        }
        read_ahead(next);
    }
    // What is found about the piece of this lane, once all warps have written the tile.
    __device__ __forceinline__ PieceTimes find(Tile& tile, int col0) const {
        PieceTimes found = {0};
        if (lane() < kLanes) {
            if (has_times) found = find(tile.ranges[piece_of_lane()], col0);
            tile.pieces[4 * group_of_lane() + warp()][piece_of_lane()] = found.code;
        }
        return found;
    }

    // All of this warp's 16 rows of a group and 32 columns, as [4 blocks of 8 columns][32 lanes] of (row r: columns c, c + 1;
    // row r + 8: c, c + 1) with r = lane / 4 and c = lane % 4 * 2. From differences in fp32:
    static __device__ __forceinline__ void look_up(const Place& place, const Tile& tile, int group, int piece,
                                                   float4* to) {
        const uint32_t* const words = place.row_words + row_of(group);
        const uint32_t base = tile.bases[piece];
        const float above = static_cast<float>(static_cast<int>(words[0] - base)),
                    below = static_cast<float>(static_cast<int>(words[8] - base));
        const float* const cols = tile.near_float + piece * kPieceCols + lane() % 4 * 2;
        const auto value = [&](float row, float col) {
            const float t = fabsf(row - col);
            const typename Shared::Quarter quarter = place.quarters[quarter_of(t)];
            return t >= quarter.edge ? quarter.above : quarter.below;
        };
        const WindowReader<Shared> window(tile, group);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float2 col = *reinterpret_cast<const float2*>(cols + n * 8);
            const float4 x{value(above, col.x), value(above, col.y), value(below, col.x), value(below, col.y)};
            to[n * 32 + lane()] = with_positions(x, window, 4 * piece + n);
        }
    }
    // and in 64 bits, seldom. row0, col0: of the block and the tile.
    static __device__ __forceinline__ void look_up_wide(const RelativeSides& sides, const Place& place,
                                                        const Tile& tile, int group, int piece, int row0, int col0,
                                                        float4* to) {
        const int row = row0 + row_of(group);
        const int64_t above = __ldg(sides.query_times + min_of(row, sides.len_q - 1)),
                      below = __ldg(sides.query_times + min_of(row + 8, sides.len_q - 1));
        const auto value = [&](int64_t of_row, int64_t of_col) {
            return place.buckets[bucket_of(time_difference(of_row, of_col))].value;
        };
        const WindowReader<Shared> window(tile, group);
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int col = col0 + piece * kPieceCols + n * 8 + lane() % 4 * 2;
            const int64_t left = __ldg(sides.key_times + min_of(col, sides.len_k - 1)),
                          right = __ldg(sides.key_times + min_of(col + 1, sides.len_k - 1));
            const float4 x{value(above, left), value(above, right), value(below, left), value(below, right)};
            to[n * 32 + lane()] = with_positions(x, window, 4 * piece + n);
        }
    }

  private:
    static constexpr int kPositions = ceil_div(Shared::kWindow, kWarpgroup);

    static __device__ __forceinline__ int row_of(int group) {
        return 64 * group + threadIdx.x / 32 % 4 * 16 + lane() / 4;
    }
    static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }
    static __device__ __forceinline__ float4 with_positions(float4 x, const WindowReader<Shared>& window, int n) {
        const float2 above = window.pair(n), below = window.pair(n - 1);
        return {x.x + above.x, x.y + above.y, x.z + below.x, x.w + below.y};
    }

    // This thread's share of a tile.
    __device__ __forceinline__ void read_ahead(int col0) {
        if (positions != nullptr) {
#pragma unroll
            for (int i = 0; i < kPositions; ++i) {
                const int place = threadIdx.x % kWarpgroup + i * kWarpgroup - (Shared::kRows - 1);  // column - row
                position[i] = __ldg(positions + clamp_to(first - col0 - place, -reach, reach));
            }
        }
        if (has_times && warp() < kPieces)
            col_time = __ldg(key_times + min_of(col0 + warp() * kPieceCols + lane(), len_k - 1));
    }
    // Integers in the order of floats.
    static __device__ __forceinline__ int ordered(float x) {
        const int bits = __float_as_int(x);
        return bits ^ (bits >> 31 & 0x7fffffff);
    }
    static __device__ __forceinline__ float from_ordered(int order) {
        return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
    }
    // ln(x) / 0.301 to within a thousandth: the bucket below or above, where the table has as many.
    __device__ __forceinline__ int bucket(float x, float slack) const {
        return clamp_to(static_cast<int>(fmaf(__log2f(fmaxf(x, 1.0f)), 2.3028145f, slack)), 0, num_buckets);
    }
    __device__ __forceinline__ PieceTimes find(float2 cols, int col0) const {
        if (!overlaps(wanted, col0 + piece_of_lane() * kPieceCols, kPieceCols)) return {0};
        const float later = rows.x - cols.y, earlier = cols.x - rows.y, span = cols.y - cols.x;
        const float low = fmaxf(later, earlier), high = fmaxf(rows.y - cols.x, cols.y - rows.x);
        const float largest = fmaxf(fmaxf(fabsf(rows.x), fabsf(rows.y)), fmaxf(fabsf(cols.x), fabsf(cols.y)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float slack = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        const int lowest = bucket(low - slack, -1e-3f), edges = bucket(high + slack, 1e-3f) - lowest;
        if (edges == 0) return {lowest};
        if (edges <= PieceTimes::kMostEdges && low >= slack && high + slack < 0x1p30f)
            return {lowest | edges << 8 | (earlier > later ? PieceTimes::kEarlier : 0)};
        return {fmaxf(high, span) + slack < 0x1p24f - 4.0f ? PieceTimes::kLookUp : PieceTimes::kWide};
    }

    const float factor;  // 1 / alpha
    // Of the block: the position table, and the first row's position.
    const float* positions = nullptr;
    int reach = 0, first = 0;
    bool has_times = false;
    const int64_t* key_times = nullptr;
    int len_k = 0, num_buckets = 0;
    int64_t base = 0;  // the first row's time
    Spans wanted;
    float2 rows = {0.0f, 0.0f};  // the range of the times of this warp's rows of this lane's group
    // Of the tile to come.
    float position[kPositions] = {};
    int64_t col_time = 0;
};

}  // namespace hstu::attention::sm90
