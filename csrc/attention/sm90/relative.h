// The relative bias on tiles of scores, computed by a warpgroup that does nothing else.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// BiasWarps writes half of it, in fp32, to shared memory in the order of the accumulators that other warpgroups add it to:
// warp w of it has rows [16 w, 16 w + 16) of each group of 64 rows, as warp w of the warpgroup that owns the group. A tile
// is cut into pieces of 16 rows and 32 columns. One lane a piece finds from the ranges of the times on both sides which
// buckets can occur in it, and so how the warp computes it:
//   nothing     the mask keeps no pair of it
//   0 edges     one bucket: a constant
//   1 to 3      that many comparisons an element: saturating |x| + 1 - edge gives 0 or 1, for x is an integer
//   more        a look-up of x's quarter of an octave (time_bucket.h) in shared memory: an edge and the values on its sides
// All of these take differences in fp32, exact where times lie less than 2^24 from the block's first one; else they are
// taken modulo 2^32 below 2^31, and in 64 bits above.
// Rows may be queries and columns keys (the forward) or the other way round (the backward).
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

    __device__ __forceinline__ int distance(int row, int col) const {
        return kRowsAreKeys ? col + offset - row : row + offset - col;
    }
};

constexpr int kPieceCols = 32;

// kGroups groups of 64 rows; tiles of kCols columns.
template <int kGroups_, int kCols_>
struct BiasShared {
    static constexpr int kGroups = kGroups_, kCols = kCols_, kPieces = kCols / kPieceCols;
    static constexpr int kQuarters = 4 * 24;  // of differences below 2^24

    struct alignas(16) Bucket {
        float value, before_edge, step, unused;  // half the value; 1 - the edge to the next bucket; half the step to it
    };
    struct alignas(16) Quarter {
        float edge, below, above;  // half the values
        int bucket;                // below the edge
    };
    struct alignas(8) Range {
        float low, high;
    };

    Bucket buckets[kTimeBuckets];
    Quarter quarters[kQuarters];
    float col_times[2][kCols];  // of this tile and the next, counted from the block's first row
    Range col_ranges[2][kPieces];
    float row_times[4][kGroups * 16];  // of each warp
    Range row_ranges[4][kGroups];
};

template <class Shared, bool kRowsAreKeys>
class BiasWarps {
  public:
    using Sides = RelativeSides<kRowsAreKeys>;
    static constexpr int kPieces = Shared::kPieces;
    static_assert(kPieces <= 4 && Shared::kGroups * kPieces <= 32);

    // named_barrier: that the four warps meet at.
    __device__ __forceinline__ BiasWarps(Shared& shared, const Sides& first, int named_barrier)
        : shared(shared), sides(first), named_barrier(named_barrier) {
        fill_tables();
    }

    // The piece that this lane describes: of group group_of_lane(), columns piece_of_lane() * kPieceCols of the tile.
    static __device__ __forceinline__ int group_of_lane() { return min_of(lane() / kPieces, Shared::kGroups - 1); }
    static __device__ __forceinline__ int piece_of_lane() { return lane() % kPieces; }
    // This warp's rows of a group start here.
    static __device__ __forceinline__ int first_row(int row0, int group) { return row0 + 64 * group + 16 * warp(); }

    // Rows from row0 on, and the columns that the 16 rows of this lane's group need. col0: of the first tile.
    __device__ __forceinline__ void begin_block(const Sides& of, int row0_, const Spans& wanted_, int col0_) {
        const bool other_tables = of.time != sides.time;
        sides = of, row0 = row0_, wanted = wanted_;
        if (other_tables) fill_tables();
        if (sides.time == nullptr) return;
        base = sides.row_times[min_of(row0, sides.num_rows - 1)];
        read_col_time(col0_);
        __syncwarp();
#pragma unroll
        for (int first = 0; first < Shared::kGroups * 16; first += 32) {
            const int i = min_of(first + lane(), Shared::kGroups * 16 - 1);
            const int row = min_of(first_row(row0, i / 16) + i % 16, sides.num_rows - 1);
            const float t = from_base(__ldg(sides.row_times + row));
            float low = t, high = t;
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                low = fminf(low, __shfl_xor_sync(0xffffffff, low, step));
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, step));
            }
            if (first + lane() < Shared::kGroups * 16) {
                shared.row_times[warp()][i] = t;
                shared.row_ranges[warp()][i / 16] = {low, high};
            }
        }
        __syncwarp();
    }

    // next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void begin_tile(int col0_, int next) {
        col0 = col0_, buffer ^= 1;
        if (sides.time != nullptr) {
            if (warp() < kPieces) {
                const float t = from_base(col_time);
                shared.col_times[buffer][warp() * kPieceCols + lane()] = t;
                const int order = ordered(t);
                const float low = from_ordered(__reduce_min_sync(0xffffffff, order));
                const float high = from_ordered(__reduce_max_sync(0xffffffff, order));
                if (lane() == 0) shared.col_ranges[buffer][warp()] = {low, high};
            }
            named_sync(named_barrier, kWarpgroup);
            read_col_time(next);
        }
        described = describe();
    }

    // The positions' part of a piece, to be read early: blocks of 8 x 8 on the same diagonal share two values a thread.
    struct Band {
        float at[5][2];  // [half - n + 3][c]
    };
    __device__ __forceinline__ Band read_band(int group, int col) const {
        Band band = {};
        if (sides.position == nullptr) return band;
        constexpr int kSign = kRowsAreKeys ? -1 : 1;
        const int row = first_row(row0, group), corner = sides.distance(row, col);
        const int at = sides.distance(row + lane() / 4, col + lane() % 4 * 2);
        const int farthest = kRowsAreKeys ? max_of(15 - corner, corner + 31) : max_of(corner + 15, 31 - corner);
        if (farthest <= sides.reach) {
            const float* from = sides.position + at;
#pragma unroll
            for (int k = 0; k < 10; ++k) band.at[k / 2][k % 2] = __ldg(from + kSign * ((k / 2 - 3) * 8 - k % 2));
        } else {
#pragma unroll
            for (int k = 0; k < 10; ++k)
                band.at[k / 2][k % 2] =
                    __ldg(sides.position + clamp_to(at + kSign * ((k / 2 - 3) * 8 - k % 2), -sides.reach, sides.reach));
        }
        return band;
    }

    // Half the bias of a piece, as [4 blocks of 8 columns][32 lanes] of (row r: columns c, c + 1; row r + 8: c, c + 1)
    // with r = lane / 4 and c = lane % 4 * 2. Without a pair that is wanted nothing is written.
    __device__ __forceinline__ void write(int group, int piece, float4* to) const {
        write(group, piece, to, read_band(group, col0 + piece * kPieceCols));
    }
    __device__ __forceinline__ void write(int group, int piece, float4* to, const Band& band) const {
        const int found = __shfl_sync(0xffffffff, described, group * kPieces + piece);
        if (found == kNothing) return;
        const int first = found & 255, edges = found >> 8;
        typename Shared::Bucket bucket = shared.buckets[first];
        const int row = first_row(row0, group), col = col0 + piece * kPieceCols;
        float x[16];  // [4 n + 2 half + c]
        const float constant = edges <= kMaxEdges ? bucket.value : 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = fmaf(0.5f, band.at[i / 2 % 2 - i / 4 + 3][i % 2], constant);
        if (edges == 0) {
        } else if (edges <= kLookUp) {
            const float* rows = shared.row_times[warp()] + group * 16 + lane() / 4;
            const float* cols = shared.col_times[buffer] + piece * kPieceCols + lane() % 4 * 2;
            const float of_row[2] = {rows[0], rows[8]};
            float t[16];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float2 of_col = *reinterpret_cast<const float2*>(cols + 8 * n);
#pragma unroll
                for (int i = 0; i < 4; ++i) t[4 * n + i] = fabsf(of_row[i / 2] - (i % 2 ? of_col.y : of_col.x));
            }
            if (edges <= kMaxEdges) {
#pragma unroll 1
                for (int e = 1;; ++e) {
                    const typename Shared::Bucket next = shared.buckets[first + e];
#pragma unroll
                    for (int i = 0; i < 16; ++i) x[i] = fmaf(__saturatef(t[i] + bucket.before_edge), bucket.step, x[i]);
                    if (e == edges) break;
                    bucket = next;
                }
            } else {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const typename Shared::Quarter quarter = shared.quarters[quarter_of(t[i])];
                    x[i] += t[i] >= quarter.edge ? quarter.above : quarter.below;
                }
            }
        } else {
            add_exactly(x, row, col, edges == kWide);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) to[n * 32 + lane()] = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }

  private:
    static constexpr int kMaxEdges = 3, kLookUp = 4, kIntegers = 5, kWide = 6;  // above a piece's first bucket
    static constexpr int kNothing = -1;

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

    __device__ __forceinline__ void fill_tables() const {
        named_sync(named_barrier, kWarpgroup);
        const auto half = [&](int b) {
            return sides.time ? 0.5f * __ldg(sides.time + min_of(b, sides.num_buckets)) : 0.0f;
        };
        const int thread = threadIdx.x % kWarpgroup;
        for (int b = thread; b < kTimeBuckets; b += kWarpgroup) {
            const uint32_t edge = kEdgesOfTime.at[min_of(b + 1, kTimeBuckets - 1)];
            shared.buckets[b] = {half(b), 1.0f - static_cast<float>(edge), half(b + 1) - half(b), 0.0f};
        }
        if (thread < Shared::kQuarters) {
            const TimeQuarter& quarter = kQuartersOfTime.at[thread];
            shared.quarters[thread] = {static_cast<float>(quarter.edge_low), half(quarter.bucket),
                                       half(quarter.bucket + 1), quarter.bucket};
        }
        named_sync(named_barrier, kWarpgroup);
    }

    // A time counted from the block's first: exact below 2^24, else off by at most 1 + 2^-23 of itself.
    __device__ __forceinline__ float from_base(int64_t t) const {
        const float about = 2.0f * __ll2float_rn((t >> 1) - (base >> 1));
        return fabsf(about) < 0x1p24f - 4.0f
                   ? static_cast<float>(static_cast<int>(static_cast<uint32_t>(t) - static_cast<uint32_t>(base)))
                   : about;
    }
    // Integers in the order of floats.
    static __device__ __forceinline__ int ordered(float x) {
        const int bits = __float_as_int(x);
        return bits ^ (bits >> 31 & 0x7fffffff);
    }
    static __device__ __forceinline__ float from_ordered(int order) {
        return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
    }
    __device__ __forceinline__ void read_col_time(int first) {
        if (warp() < kPieces)
            col_time = __ldg(sides.col_times + min_of(first + warp() * kPieceCols + lane(), sides.num_cols - 1));
    }

    // This lane's piece: the first bucket that can occur, and above it the number of edges or how to look up.
    __device__ __forceinline__ int describe() const {
        if (!overlaps(wanted, col0 + piece_of_lane() * kPieceCols, kPieceCols)) return kNothing;
        if (sides.time == nullptr) return 0;
        const typename Shared::Range rows = shared.row_ranges[warp()][group_of_lane()];
        const typename Shared::Range cols = shared.col_ranges[buffer][piece_of_lane()];
        const float low = fmaxf(0.0f, fmaxf(rows.low - cols.high, cols.low - rows.high));
        const float high = fmaxf(rows.high - cols.low, cols.high - rows.low);
        const float largest = fmaxf(fmaxf(fabsf(rows.low), fabsf(rows.high)), fmaxf(fabsf(cols.low), fabsf(cols.high)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float slack = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        int first, last;
        if (exact) {
            const auto bucket = [&](float x) {
                const typename Shared::Quarter& quarter = shared.quarters[quarter_of(x)];
                return quarter.bucket + (x >= quarter.edge ? 1 : 0);
            };
            first = bucket(low), last = bucket(high);
        } else {
            first = bucket_of(static_cast<uint64_t>(__float2ull_rz(fmaxf(low - slack, 0.0f))));
            last = bucket_of(static_cast<uint64_t>(__float2ull_rz(high + slack)));
        }
        first = min_of(first, sides.num_buckets), last = min_of(last, sides.num_buckets);
        int edges = last - first;
        if (edges > 0 && !exact)
            edges = high + slack < 0x1p31f ? kIntegers : kWide;
        else if (edges > kMaxEdges)
            edges = kLookUp;
        return first | edges << 8;
    }

    // The time bias from differences of integers.
    __device__ __forceinline__ void add_exactly(float (&x)[16], int row, int col, bool wide) const {
        const auto row_of = [&](int half) {
            return sides.row_times + min_of(row + lane() / 4 + 8 * half, sides.num_rows - 1);
        };
        const auto col_of = [&](int n, int c) {
            return sides.col_times + min_of(col + n * 8 + lane() % 4 * 2 + c, sides.num_cols - 1);
        };
        const auto low_word = [](const int64_t* t) { return __ldg(reinterpret_cast<const uint32_t*>(t)); };
        if (!wide) {
            const uint32_t of_row[2] = {low_word(row_of(0)), low_word(row_of(1))};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const uint32_t of_col[2] = {low_word(col_of(n, 0)), low_word(col_of(n, 1))};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int difference = static_cast<int>(of_row[i / 2] - of_col[i % 2]);
                    const int bucket = bucket_of(static_cast<uint32_t>(difference < 0 ? -difference : difference));
                    x[4 * n + i] += shared.buckets[bucket].value;
                }
            }
            return;
        }
        // Seldom: a loop keeps the code small.
        const int64_t of_row[2] = {__ldg(row_of(0)), __ldg(row_of(1))};
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            float add[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                add[i] = shared.buckets[bucket_of(time_difference(of_row[i / 2], __ldg(col_of(n, i % 2))))].value;
#pragma unroll
            for (int i = 0; i < 16; ++i)
                if (i / 4 == n) x[i] += add[i % 4];
        }
    }

    Shared& shared;
    Sides sides;
    const int named_barrier;
    int row0 = 0, col0 = 0, buffer = 0, described = 0;
    Spans wanted;
    int64_t base = 0, col_time = 0;  // the block's first time; one of the tile to come
};

}  // namespace hstu::attention::sm90
