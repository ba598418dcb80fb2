// The relative bias on tiles of scores, prepared by warps that do nothing else.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// The two parts reach the accumulators on different ways, always halved and in fp32:
//   positions   a window a tile in shared memory, from the last row and first column to the first row and last column;
//               blocks of 8 x 8 on the same diagonal share a pair of its values a thread (WindowReader)
//   times       of pieces of 16 rows and 32 columns: a constant where one bucket alone can occur, which is most of them;
//               else all values, in the order of the accumulators
// Which buckets can occur follows from the ranges of the times on both sides; TileDescriber finds it, one lane a piece,
// ahead of the warpgroup BiasWarps, which writes all the rest. A piece with up to three edges between buckets costs as many
// comparisons an element: saturating |x| + 1 - edge gives 0 or 1, for x is an integer. More: a look-up of x's quarter of an
// octave (time_bucket.h) in shared memory: an edge and the values on its sides. Differences are taken in fp32, exact where
// times lie less than 2^24 from the block's first one; else modulo 2^32 below 2^31, and in 64 bits above.
// Warp w of the bias warps has rows [16 w, 16 w + 16) of each group of 64 rows, as warp w of the warpgroup that owns the
// group. Rows are queries and columns keys, as the forward has them, or the other way round.
#pragma once

#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"
#include "attention/time_lookup.h"

namespace hstu::attention::sm90 {

// One head's tables and one sequence's times, by the rows and columns of tiles.
template <bool kRowsAreKeys>
struct RelativeSides {
    const float* position;  // at distance 0; may be nullptr
    const float* time;      // may be nullptr
    int reach, num_buckets, offset;
    int num_rows, num_cols;
    const int64_t *row_times, *col_times;

    __device__ __forceinline__ RelativeSides(const Relative& r, int head, int64_t q_begin, int64_t k_begin, int len_q,
                                             int len_k)
        : position(r.position ? static_cast<const float*>(r.position) + head * r.position_head_stride + r.reach
                              : nullptr),
          time(r.time ? static_cast<const float*>(r.time) + head * r.time_head_stride : nullptr), reach(r.reach),
          num_buckets(r.num_buckets), offset(len_k - len_q), num_rows(kRowsAreKeys ? len_k : len_q),
          num_cols(kRowsAreKeys ? len_q : len_k),
          row_times(kRowsAreKeys ? r.key_times + k_begin : r.query_times + q_begin),
          col_times(kRowsAreKeys ? r.query_times + q_begin : r.key_times + k_begin) {}
};

constexpr int kPieceCols = 32;

// kGroups groups of 64 rows; tiles of kCols columns.
template <int kGroups_, int kCols_>
struct BiasShared {
    static constexpr int kGroups = kGroups_, kCols = kCols_, kPieces = kCols / kPieceCols;
    static constexpr int kQuarters = 4 * 24;  // of differences below 2^24
    static constexpr int kRows = 64 * kGroups, kWindow = kRows + kCols;

    struct alignas(16) Bucket {
        float value, before_edge, step;  // half the value; 1 - the edge to the next bucket; half the step to it
        uint32_t edge;
    };
    struct alignas(16) Quarter {
        float edge, below, above;  // half the values
    };

    // Half the position bias of this tile and the next: [kRows - 1 - row + column], and the same a word later, so that the
    // pair of any two neighbours is aligned in one of them.
    alignas(8) float window[2][2][kWindow + 2];
    Bucket buckets[kTimeBuckets];
    Quarter quarters[kQuarters];
    // A tile's columns, counted from the block's first row and as the low halves of integers, and what is found about
    // the pieces: [rows / 16][piece].
    struct Described {
        alignas(8) float times[kCols];
        alignas(8) uint32_t words[kCols];
        int found[4 * kGroups * kPieces];
    };
    Described tiles[2];
    float row_times[4][kGroups * 16];  // of each warp
    uint32_t row_words[4][kGroups * 16];
};

// What is known of the times of pieces beside one another.
struct alignas(16) BiasNote {
    float constant[2];
    uint32_t written;  // bit by bit: the piece has values, not a constant
    uint32_t unused;
};

// A thread's way to its pairs of positions: pair(buffer, n) is of row lane / 4 of the warp's and columns 8 n + lane % 4 * 2
// and the next; pair(buffer, n - 1) is of the row 8 below.
template <class Shared>
struct WindowReader {
    const float* from;

    __device__ __forceinline__ WindowReader(const Shared& shared, int group) {
        const int row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane() / 4;
        const int place = Shared::kRows - 1 - row + lane() % 4 * 2;
        from = shared.window[0][place % 2] + place + place % 2;
    }
    __device__ __forceinline__ float2 pair(int buffer, int n) const {
        return *reinterpret_cast<const float2*>(from + buffer * 2 * (Shared::kWindow + 2) + n * 8);
    }
};

// A time counted from a base: exact below 2^24, else off by at most 1 + 2^-23 of itself.
__device__ __forceinline__ float time_from(int64_t base, int64_t t) {
    const float about = 2.0f * __ll2float_rn((t >> 1) - (base >> 1));
    return fabsf(about) < 0x1p24f - 4.0f
               ? static_cast<float>(static_cast<int>(static_cast<uint32_t>(t) - static_cast<uint32_t>(base)))
               : about;
}

// What is found about a piece: the first bucket, the number of edges above it (or kLookUp), the size of differences.
struct Found {
    static constexpr int kNothing = 1 << 20, kLookUp = 4, kEdgesShift = 8, kSizeShift = 12;
    static constexpr int kSmall = 0, kMedium = 1, kWide = 2;  // exact in fp32, below 2^31, any

    int code;

    __device__ __forceinline__ int bucket() const { return code & 255; }
    __device__ __forceinline__ int edges() const { return code >> kEdgesShift & 15; }
    __device__ __forceinline__ int size() const { return code >> kSizeShift; }
    __device__ __forceinline__ bool has_values() const { return code >> kEdgesShift != 0 && code != kNothing; }
};

// One warp that finds out about the times of tiles, ahead of the bias warps.
template <class Shared, bool kRowsAreKeys>
class TileDescriber {
  public:
    using Sides = RelativeSides<kRowsAreKeys>;
    static constexpr int kPieces = Shared::kPieces, kStrips = 4 * Shared::kGroups;
    static_assert(kStrips * kPieces <= 32);

    __device__ __forceinline__ TileDescriber(Shared& shared, const Sides& first) : shared(shared), sides(first) {}

    // The 16 rows and the piece of columns that this lane describes.
    static __device__ __forceinline__ int strip_of_lane() { return min_of(lane() / kPieces, kStrips - 1); }
    static __device__ __forceinline__ int piece_of_lane() { return lane() % kPieces; }

    // Rows from row0 on, and the columns that this lane's strip needs. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const Sides& of, int row0, const Spans& wanted_, int col0) {
        sides = of, wanted = wanted_;
        if (sides.time == nullptr) return;
        base = __ldg(sides.row_times + min_of(row0, sides.num_rows - 1));
        read_col_times(col0);
#pragma unroll
        for (int first = 0; first < 16 * kStrips; first += 32) {
            const float t = time_from(base, __ldg(sides.row_times + min_of(row0 + first + lane(), sides.num_rows - 1)));
            Range range{t, t};
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                range.low = fminf(range.low, __shfl_xor_sync(0xffffffff, range.low, step));
                range.high = fmaxf(range.high, __shfl_xor_sync(0xffffffff, range.high, step));
            }
            const int from = strip_of_lane() * 16 - first;
            const float low = __shfl_sync(0xffffffff, range.low, from),
                        high = __shfl_sync(0xffffffff, range.high, from);
            if (from >= 0 && from < 32) rows = {low, high};
        }
    }
    // next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void describe_tile(int buffer, int col0, int next) {
        typename Shared::Described& to = shared.tiles[buffer];
        Range cols = {};
        if (sides.time != nullptr) {
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const float t = time_from(base, col_time[piece]);
                to.times[piece * kPieceCols + lane()] = t;
                to.words[piece * kPieceCols + lane()] = static_cast<uint32_t>(col_time[piece]);
                const int order = ordered(t);
                const int low = __reduce_min_sync(0xffffffff, order), high = __reduce_max_sync(0xffffffff, order);
                if (piece == piece_of_lane()) cols = {from_ordered(low), from_ordered(high)};
            }
            read_col_times(next);
        }
        if (lane() < kStrips * kPieces) to.found[lane()] = find(cols, col0);
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
            col_time[piece] = __ldg(sides.col_times + min_of(first + piece * kPieceCols + lane(), sides.num_cols - 1));
    }
    __device__ __forceinline__ int find(const Range& cols, int col0) const {
        if (!overlaps(wanted, col0 + piece_of_lane() * kPieceCols, kPieceCols)) return Found::kNothing;
        if (sides.time == nullptr) return 0;
        const float low = fmaxf(rows.low - cols.high, cols.low - rows.high);
        const float high = fmaxf(rows.high - cols.low, cols.high - rows.low);
        const float largest = fmaxf(fmaxf(fabsf(rows.low), fabsf(rows.high)), fmaxf(fabsf(cols.low), fabsf(cols.high)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float slack = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        const auto bucket = [&](float x) {
            return min_of(bucket_of(static_cast<uint64_t>(__float2ull_rz(fmaxf(x, 0.0f)))), sides.num_buckets);
        };
        const int first = bucket(low - slack), edges = min_of(bucket(high + slack) - first, +Found::kLookUp);
        const int size = edges == 0 || exact ? Found::kSmall : high + slack < 0x1p31f ? Found::kMedium : Found::kWide;
        return first | edges << Found::kEdgesShift | size << Found::kSizeShift;
    }

    Shared& shared;
    Sides sides;
    Spans wanted;
    Range rows = {};
    int64_t base = 0;                // the block's first time
    int64_t col_time[kPieces] = {};  // of the tile to come
};

template <class Shared, bool kRowsAreKeys>
class BiasWarps {
  public:
    using Sides = RelativeSides<kRowsAreKeys>;
    static constexpr int kPieces = Shared::kPieces;

    // named_barrier: that the four warps meet at when they fill the tables.
    __device__ __forceinline__ BiasWarps(Shared& shared, const Sides& first, int named_barrier)
        : shared(shared), sides(first), named_barrier(named_barrier) {
        fill_tables();
    }

    // Rows from row0 on. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const Sides& of, int row0_, int col0_) {
        const bool other_tables = of.time != sides.time;
        sides = of, row0 = row0_;
        if (other_tables) fill_tables();
        read_positions(col0_);
        if (sides.time == nullptr) return;
        const int64_t base = __ldg(sides.row_times + min_of(row0, sides.num_rows - 1));
        __syncwarp();
#pragma unroll
        for (int i = lane(); i < Shared::kGroups * 16; i += 32) {
            const int64_t time = __ldg(sides.row_times + min_of(first_row(i / 16) + i % 16, sides.num_rows - 1));
            shared.row_times[warp()][i] = time_from(base, time);
            shared.row_words[warp()][i] = static_cast<uint32_t>(time);
        }
        __syncwarp();
    }

    // A tile that is described in `tile` of two. next: where the block's next one starts, or any column.
    __device__ __forceinline__ void begin_tile(int tile_, int col0_, int next) {
        tile = tile_, col0 = col0_, buffer ^= 1;
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            const int place = threadIdx.x % kWarpgroup + i * kWarpgroup;
            if (place < Shared::kWindow)
                shared.window[buffer][0][place] = shared.window[buffer][1][place + 1] = 0.5f * position[i];
        }
        read_positions(next);
    }

    // kCount pieces beside one another of the current tile, from piece `first` on.
    template <int kCount>
    struct Part {
        int group, first;
        Found found[kCount];
        typename Shared::Bucket bucket[kCount];  // the first that can occur
    };
    template <int kCount>
    __device__ __forceinline__ Part<kCount> read(int group, int first) const {
        static_assert(kCount <= 2);
        Part<kCount> part;
        part.group = group, part.first = first;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            part.found[i] = {shared.tiles[tile].found[(4 * group + warp()) * kPieces + first + i]};
            part.bucket[i] = shared.buckets[part.found[i].bucket()];
        }
        return part;
    }
    // The times of a part. Values, where a piece has them, as [4 blocks of 8 columns][32 lanes] of (row r: columns c, c + 1;
    // row r + 8: c, c + 1) with r = lane / 4 and c = lane % 4 * 2, piece after piece.
    template <int kCount>
    __device__ __forceinline__ void write(const Part<kCount>& part, float4* to, BiasNote* note) const {
        BiasNote noted = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            noted.constant[i] = part.bucket[i].value;
            if (part.found[i].has_values()) noted.written |= 1u << i;
        }
        if (lane() == 0) *note = noted;
        if (noted.written == 0) return;
#pragma unroll 1
        for (int i = 0; i < kCount; ++i)
            if (noted.written >> i & 1)
                write_values(part.group, part.first + i, i == 0 ? part.found[0] : part.found[kCount - 1],
                             i == 0 ? part.bucket[0] : part.bucket[kCount - 1], to + i * 128);
    }

  private:
    static constexpr int kPositions = ceil_div(Shared::kWindow, kWarpgroup);

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }
    __device__ __forceinline__ int first_row(int group) const { return row0 + 64 * group + 16 * warp(); }

    __device__ __forceinline__ void fill_tables() const {
        named_sync(named_barrier, kWarpgroup);
        const auto half = [&](int b) {
            return sides.time ? 0.5f * __ldg(sides.time + min_of(b, sides.num_buckets)) : 0.0f;
        };
        const int thread = threadIdx.x % kWarpgroup;
        for (int b = thread; b < kTimeBuckets; b += kWarpgroup) {
            const uint32_t edge = kEdgesOfTime.at[min_of(b + 1, kTimeBuckets - 1)];
            shared.buckets[b] = {half(b), 1.0f - static_cast<float>(edge), half(b + 1) - half(b), edge};
        }
        if (thread < Shared::kQuarters) {
            const TimeQuarter& quarter = kQuartersOfTime.at[thread];
            shared.quarters[thread] = {static_cast<float>(quarter.edge_low), half(quarter.bucket),
                                       half(quarter.bucket + 1)};
        }
        named_sync(named_barrier, kWarpgroup);
    }

    // This thread's share of a window.
    __device__ __forceinline__ void read_positions(int first) {
        if (sides.position == nullptr) return;
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            const int place = threadIdx.x % kWarpgroup + i * kWarpgroup - (Shared::kRows - 1);  // column - row
            const int distance =
                kRowsAreKeys ? first - row0 + place + sides.offset : row0 + sides.offset - first - place;
            position[i] = __ldg(sides.position + clamp_to(distance, -sides.reach, sides.reach));
        }
    }

    __device__ __forceinline__ void write_values(int group, int piece, Found found, typename Shared::Bucket bucket,
                                                 float4* to) const {
        const int edges = found.edges(), size = found.size();
        float x[16];  // [4 n + 2 half + c]
        if (size == Found::kSmall && edges == Found::kLookUp) {
            float t[16];
            read_differences(t, group, piece);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const typename Shared::Quarter quarter = shared.quarters[quarter_of(t[i])];
                x[i] = t[i] >= quarter.edge ? quarter.above : quarter.below;
            }
        } else if (edges == Found::kLookUp || size == Found::kWide) {
            look_up_wide(x, group, piece);
        } else {
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = bucket.value;
            if (size == Found::kSmall)
                add_steps<float>(x, group, piece, bucket, &shared.buckets[found.bucket()], edges);
            else
                add_steps<uint32_t>(x, group, piece, bucket, &shared.buckets[found.bucket()], edges);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) to[n * 32 + lane()] = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }
    // Both sides' times: in fp32, or the low halves of integers.
    template <class Time>
    __device__ __forceinline__ void read_differences(Time (&t)[16], int group, int piece) const {
        const int row = group * 16 + lane() / 4, col = piece * kPieceCols + lane() % 4 * 2;
        if constexpr (std::is_same_v<Time, float>)
            differences(t, shared.row_times[warp()] + row, shared.tiles[tile].times + col);
        else
            differences(t, shared.row_words[warp()] + row, shared.tiles[tile].words + col);
    }
    template <class Time>
    __device__ __forceinline__ void add_steps(float (&x)[16], int group, int piece, typename Shared::Bucket bucket,
                                              const typename Shared::Bucket* buckets, int edges) const {
        Time t[16];
        read_differences(t, group, piece);
#pragma unroll 1
        for (int edge = 1;; ++edge) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if constexpr (std::is_same_v<Time, float>)
                    x[i] = fmaf(__saturatef(t[i] + bucket.before_edge), bucket.step, x[i]);
                else if (t[i] >= bucket.edge)
                    x[i] += bucket.step;
            }
            if (edge == edges) break;
            bucket = buckets[edge];
        }
    }
    // |row - column|; of 32-bit integers modulo 2^32.
    template <class Time>
    static __device__ __forceinline__ void differences(Time (&t)[16], const Time* rows, const Time* cols) {
        struct alignas(8) Pair {
            Time of[2];
        };
        const Time of_row[2] = {rows[0], rows[8]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const Pair of_col = *reinterpret_cast<const Pair*>(cols + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Time difference = of_row[i / 2] - of_col.of[i % 2];
                if constexpr (std::is_same_v<Time, float>)
                    t[4 * n + i] = fabsf(difference);
                else
                    t[4 * n + i] = static_cast<int>(difference) < 0 ? -difference : difference;
            }
        }
    }

    // From differences in 64 bits. Seldom: a loop keeps the code small.
    __device__ __forceinline__ void look_up_wide(float (&x)[16], int group, int piece) const {
        const int row = first_row(group) + lane() / 4;
        const int64_t of_row[2] = {__ldg(sides.row_times + min_of(row, sides.num_rows - 1)),
                                   __ldg(sides.row_times + min_of(row + 8, sides.num_rows - 1))};
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int col = col0 + piece * kPieceCols + n * 8 + lane() % 4 * 2;
            float found[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t of_col = __ldg(sides.col_times + min_of(col + i % 2, sides.num_cols - 1));
                found[i] = shared.buckets[bucket_of(time_difference(of_row[i / 2], of_col))].value;
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = i / 4 == n ? found[i % 4] : n == 0 ? 0.0f : x[i];
        }
    }

    Shared& shared;
    Sides sides;
    const int named_barrier;
    int row0 = 0, col0 = 0, tile = 0, buffer = 1;
    float position[kPositions] = {};  // of the window to come
};

}  // namespace hstu::attention::sm90
