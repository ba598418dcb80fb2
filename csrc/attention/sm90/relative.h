// The relative bias on tiles of scores, prepared by warps that do nothing else.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// The two parts reach the consumers' accumulators on different ways, always halved and in fp32:
//   positions   a window a tile in shared memory, from the last row and first column to the first row and last column;
//               blocks of 8 x 8 on the same diagonal share a pair of its values a thread (WindowReader)
//   times       of pieces of 16 rows and 32 columns, by the buckets that can occur there (PieceTimes): of one bucket a
//               constant; a few edges between buckets, where all rows are later than all columns or all earlier, are
//               compared by the consumers, an integer a column; else all values, in the order of the accumulators
// Which buckets can occur follows from the ranges of the times on both sides; TileDescriber finds it, one lane a piece.
// BiasWarps, a warpgroup, writes windows, tables and values: by a look-up of a difference's quarter of an octave
// (time_bucket.h) in shared memory, an edge and the values on its sides. Integers are counted from the piece's first
// column, modulo 2^32, and serve below 2^30; differences in fp32 are exact below 2^24; all others are taken in 64 bits.
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
    static constexpr int kSeveralEdges = 6 << 8, kLookUp = 1 << 12, kWide = 2 << 12, kEarlier = 1 << 14;
    static constexpr int kValues = kLookUp | kWide;  // bias warps write them, from differences in fp32 or in 64 bits

    int code;  // several may be joined by |

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
        float value, step;  // half the value, half the step to the next bucket
        uint32_t edge;      // to the next bucket
        uint32_t unused;
    };
    struct alignas(16) Quarter {
        float edge, below, above;  // half the values
    };
    struct Place {
        Bucket buckets[kTimeBuckets];
        Quarter quarters[kQuarters];
        uint32_t row_words[kRows];  // the low halves of the rows' times
    };
    struct Tile {
        // Half the position bias: [kRows - 1 - row + column], and the same a word later, so that the pair of any two
        // neighbours is aligned in one of them; half of the banks apart.
        alignas(16) float window[2][kWindow + 16];
        // Of each piece's columns, counted from its first; and that first as the low half of an integer.
        alignas(8) int near[kCols];
        alignas(8) float near_float[kCols];
        alignas(4 * kPieces) int pieces[4 * kGroups][kPieces];  // PieceTimes by rows / 16
        alignas(4 * kPieces) uint32_t bases[kPieces];
    };

    Place places[kPlaces];
    Tile tiles[kTiles];
};

// A time counted from a base: exact below 2^24, else off by at most 1 + 2^-23 of itself.
__device__ __forceinline__ float time_from(int64_t base, int64_t t) {
    const float about = 2.0f * __ll2float_rn((t >> 1) - (base >> 1));
    return fabsf(about) < 0x1p24f - 4.0f
               ? static_cast<float>(static_cast<int>(static_cast<uint32_t>(t) - static_cast<uint32_t>(base)))
               : about;
}

// One warp that finds out about the times of tiles, ahead of all others.
template <class Shared>
class TileDescriber {
  public:
    static constexpr int kPieces = Shared::kPieces, kStrips = 4 * Shared::kGroups;
    static_assert(kStrips * kPieces <= 32);

    // The 16 rows and the piece of columns that this lane describes.
    static __device__ __forceinline__ int strip_of_lane() { return min_of(lane() / kPieces, kStrips - 1); }
    static __device__ __forceinline__ int piece_of_lane() { return lane() % kPieces; }

    __device__ __forceinline__ TileDescriber(const RelativeSides& first) : sides(first) {}

    // Rows from row0 on, and the columns that this lane's strip needs. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const RelativeSides& of, int row0, const Spans& wanted_, int col0,
                                                typename Shared::Place& place) {
        sides = of, wanted = wanted_;
        if (sides.time == nullptr) return;
        int64_t time[kStrips / 2];
#pragma unroll
        for (int i = 0; i < kStrips / 2; ++i)
            time[i] = __ldg(sides.query_times + min_of(row0 + 32 * i + lane(), sides.len_q - 1));
        base = __ldg(sides.query_times + min_of(row0, sides.len_q - 1));
        read_col_times(col0);
#pragma unroll
        for (int i = 0; i < kStrips / 2; ++i) {
            place.row_words[32 * i + lane()] = static_cast<uint32_t>(time[i]);
            const float t = time_from(base, time[i]);
            Range range{t, t};
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                range.low = fminf(range.low, __shfl_xor_sync(0xffffffff, range.low, step));
                range.high = fmaxf(range.high, __shfl_xor_sync(0xffffffff, range.high, step));
            }
            const int from = strip_of_lane() * 16 - 32 * i;
            const float low = __shfl_sync(0xffffffff, range.low, from),
                        high = __shfl_sync(0xffffffff, range.high, from);
            if (from >= 0 && from < 32) rows = {low, high};
        }
    }
    // next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void describe_tile(typename Shared::Tile& to, int col0, int next) {
        Range cols = {};
        if (sides.time != nullptr) {
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const int order = ordered(time_from(base, col_time[piece]));
                const int low = __reduce_min_sync(0xffffffff, order), high = __reduce_max_sync(0xffffffff, order);
                if (piece == piece_of_lane()) cols = {from_ordered(low), from_ordered(high)};
                const int word = static_cast<int>(static_cast<uint32_t>(col_time[piece]));
                const int first = __shfl_sync(0xffffffff, word, 0);
                const int near = static_cast<int>(static_cast<uint32_t>(word) - static_cast<uint32_t>(first));
                to.near[piece * kPieceCols + lane()] = near;
                to.near_float[piece * kPieceCols + lane()] = static_cast<float>(near);
                if (lane() == 0) to.bases[piece] = static_cast<uint32_t>(first);
            }
            read_col_times(next);
        }
        if (lane() < kStrips * kPieces) to.pieces[lane() / kPieces][piece_of_lane()] = find(cols, col0);
    }

  private:
    struct Range {
        float low, high;
    };

    // Integers in the order of floats.
    static __device__ __forceinline__ int ordered(float x) {
        const int bits = __float_as_int(x);
        return bits ^ (bits >> 31 & 0x7fffffff);
    }
    static __device__ __forceinline__ float from_ordered(int order) {
        return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
    }
    __device__ __forceinline__ void read_col_times(int first) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
            col_time[piece] = __ldg(sides.key_times + min_of(first + piece * kPieceCols + lane(), sides.len_k - 1));
    }
    // ln(x) / 0.301 to within a thousandth: the bucket below or above, where the table has as many.
    __device__ __forceinline__ int bucket(float x, float slack) const {
        return clamp_to(static_cast<int>(fmaf(__log2f(fmaxf(x, 1.0f)), 2.3028145f, slack)), 0, sides.num_buckets);
    }
    __device__ __forceinline__ int find(const Range& cols, int col0) const {
        if (sides.time == nullptr || !overlaps(wanted, col0 + piece_of_lane() * kPieceCols, kPieceCols)) return 0;
        const float later = rows.low - cols.high, earlier = cols.low - rows.high, span = cols.high - cols.low;
        const float low = fmaxf(later, earlier), high = fmaxf(rows.high - cols.low, cols.high - rows.low);
        const float largest = fmaxf(fmaxf(fabsf(rows.low), fabsf(rows.high)), fmaxf(fabsf(cols.low), fabsf(cols.high)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float slack = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        const int first = bucket(low - slack, -1e-3f), edges = bucket(high + slack, 1e-3f) - first;
        if (edges == 0) return first;
        if (edges <= PieceTimes::kMostEdges && low >= slack && high + slack < 0x1p30f)
            return first | edges << 8 | (earlier > later ? PieceTimes::kEarlier : 0);
        return fmaxf(high, span) + slack < 0x1p24f - 4.0f ? PieceTimes::kLookUp : PieceTimes::kWide;
    }

    RelativeSides sides;
    Spans wanted;
    Range rows = {};
    int64_t base = 0;                // the block's first time
    int64_t col_time[kPieces] = {};  // of the tile to come
};

template <class Shared>
class BiasWarps {
  public:
    using Place = typename Shared::Place;
    using Tile = typename Shared::Tile;

    __device__ __forceinline__ BiasWarps(const RelativeSides& first) : sides(first) {}

    // Rows from row0 on. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const RelativeSides& of, int row0_, int col0) {
        sides = of, row0 = row0_;
        read_positions(col0);
    }

    // This thread's share of the time tables.
    __device__ __forceinline__ void write_tables(Place& place) const {
        const auto half = [&](int b) {
            return sides.time ? 0.5f * __ldg(sides.time + min_of(b, sides.num_buckets)) : 0.0f;
        };
        const int thread = threadIdx.x % kWarpgroup;
        for (int b = thread; b < kTimeBuckets; b += kWarpgroup)
            place.buckets[b] = {half(b), half(b + 1) - half(b), kEdgesOfTime.at[min_of(b + 1, kTimeBuckets - 1)], 0};
        if (thread < Shared::kQuarters) {
            const TimeQuarter& quarter = kQuartersOfTime.at[thread];
            place.quarters[thread] = {static_cast<float>(quarter.edge_low), half(quarter.bucket),
                                      half(quarter.bucket + 1)};
        }
    }
    // This thread's share of a tile's window. next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void write_window(Tile& tile, int next) {
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            const int place = threadIdx.x % kWarpgroup + i * kWarpgroup;
            if (place < Shared::kWindow) tile.window[0][place] = tile.window[1][place + 1] = 0.5f * position[i];
        }
        read_positions(next);
    }

    // The times of this warp's 16 rows of a group and 32 columns, as [4 blocks of 8 columns][32 lanes] of (row r: columns
    // c, c + 1; row r + 8: c, c + 1) with r = lane / 4 and c = lane % 4 * 2. col0: of the tile.
    __device__ __forceinline__ void write_values(const Place& place, const Tile& tile, PieceTimes found, int group,
                                                 int piece, int col0, float4* to) const {
        float x[16];  // [4 n + 2 half + c]
        if (found.code & PieceTimes::kWide)
            look_up_wide(x, place, group, col0 + piece * kPieceCols);
        else
            look_up(x, place, tile, group, piece);
#pragma unroll
        for (int n = 0; n < 4; ++n) to[n * 32 + lane()] = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }

  private:
    static constexpr int kPositions = ceil_div(Shared::kWindow, kWarpgroup);

    static __device__ __forceinline__ int row_of(int group) {
        return 64 * group + threadIdx.x / 32 % 4 * 16 + lane() / 4;
    }

    // This thread's share of a window.
    __device__ __forceinline__ void read_positions(int col0) {
        if (sides.position == nullptr) return;
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            const int place = threadIdx.x % kWarpgroup + i * kWarpgroup - (Shared::kRows - 1);  // column - row
            position[i] =
                __ldg(sides.position + clamp_to(row0 + sides.offset - col0 - place, -sides.reach, sides.reach));
        }
    }
    // From differences in fp32.
    __device__ __forceinline__ void look_up(float (&x)[16], const Place& place, const Tile& tile, int group,
                                            int piece) const {
        struct alignas(8) Pair {
            float of[2];
        };
        const uint32_t* const words = place.row_words + row_of(group);
        const uint32_t base = tile.bases[piece];
        const float of_row[2] = {static_cast<float>(static_cast<int>(words[0] - base)),
                                 static_cast<float>(static_cast<int>(words[8] - base))};
        const float* const cols = tile.near_float + piece * kPieceCols + lane() % 4 * 2;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const Pair of_col = *reinterpret_cast<const Pair*>(cols + i / 4 * 8);
            const float t = fabsf(of_row[i / 2 % 2] - of_col.of[i % 2]);
            const typename Shared::Quarter quarter = place.quarters[quarter_of(t)];
            x[i] = t >= quarter.edge ? quarter.above : quarter.below;
        }
    }
    // From differences in 64 bits. Seldom: a loop keeps the code small.
    __device__ __forceinline__ void look_up_wide(float (&x)[16], const Place& place, int group, int first) const {
        const int row = row0 + row_of(group);
        const int64_t of_row[2] = {__ldg(sides.query_times + min_of(row, sides.len_q - 1)),
                                   __ldg(sides.query_times + min_of(row + 8, sides.len_q - 1))};
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int col = first + n * 8 + lane() % 4 * 2;
            float found[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t of_col = __ldg(sides.key_times + min_of(col + i % 2, sides.len_k - 1));
                found[i] = place.buckets[bucket_of(time_difference(of_row[i / 2], of_col))].value;
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = i / 4 == n ? found[i % 4] : n == 0 ? 0.0f : x[i];
        }
    }

    RelativeSides sides;
    int row0 = 0;
    float position[kPositions] = {};  // of the window to come
};

}  // namespace hstu::attention::sm90
