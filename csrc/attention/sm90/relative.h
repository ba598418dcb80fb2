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
    static constexpr int kQuarters =
        4 * 66;  // right below 2^24, and there for whatever lies in a part with such a piece

    struct alignas(16) Bucket {
        float value, before_edge, step, unused;  // half the value; 1 - the edge to the next bucket; half the step to it
    };
    struct alignas(16) Quarter {
        float edge, below, above;  // half the values
        int bucket;                // below the edge
    };

    Bucket buckets[kTimeBuckets];
    Quarter quarters[kQuarters];
    float col_times[4][kCols];  // each warp's, of this tile, counted from the block's first row
    float row_times[4][kGroups * 16];
};

template <class Shared, bool kRowsAreKeys>
class BiasWarps {
  public:
    using Sides = RelativeSides<kRowsAreKeys>;
    static constexpr int kPieces = Shared::kPieces;
    static_assert(kPieces <= 4 && Shared::kGroups * kPieces <= 32);

    // named_barrier: that the four warps meet at when they fill the tables.
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
        base = __ldg(sides.row_times + min_of(row0, sides.num_rows - 1));
        read_col_times(col0_);
        __syncwarp();
#pragma unroll
        for (int first = 0; first < Shared::kGroups * 16; first += 32) {
            const int i = min_of(first + lane(), Shared::kGroups * 16 - 1);
            const int row = min_of(first_row(row0, i / 16) + i % 16, sides.num_rows - 1);
            const float t = from_base(__ldg(sides.row_times + row));
            Range range{t, t};
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                range.low = fminf(range.low, __shfl_xor_sync(0xffffffff, range.low, step));
                range.high = fmaxf(range.high, __shfl_xor_sync(0xffffffff, range.high, step));
            }
            const int from = group_of_lane() * 16 - first;  // where the range of this lane's group is
            const float low = __shfl_sync(0xffffffff, range.low, from),
                        high = __shfl_sync(0xffffffff, range.high, from);
            if (from >= 0) rows = {low, high};
            if (first + lane() < Shared::kGroups * 16) shared.row_times[warp()][i] = t;
        }
    }

    // next: where the block's next tile starts, or any column.
    __device__ __forceinline__ void begin_tile(int col0_, int next) {
        col0 = col0_;
        Range cols = {};
        if (sides.time != nullptr) {
            __syncwarp();
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const float t = from_base(col_time[piece]);
                shared.col_times[warp()][piece * kPieceCols + lane()] = t;
                const int order = ordered(t);
                const int low = __reduce_min_sync(0xffffffff, order), high = __reduce_max_sync(0xffffffff, order);
                if (piece == piece_of_lane()) cols = {from_ordered(low), from_ordered(high)};
            }
            read_col_times(next);
            __syncwarp();
        }
        described = describe(cols);
    }

    // kCount pieces beside one another, of the current tile: what is to be read before they are computed.
    template <int kCount>
    struct Part {
        int group, first;  // the first piece
        int found[kCount];
        typename Shared::Bucket bucket[kCount];
        float band[4 * kCount + 1][2];  // positions: blocks of 8 x 8 on the same diagonal, [half - n + 4 kCount - 1][c]
    };
    template <int kCount>
    __device__ __forceinline__ Part<kCount> read(int group, int first) const {
        Part<kCount> part;
        part.group = group, part.first = first;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            part.found[i] = __shfl_sync(0xffffffff, described, group * kPieces + first + i);
            part.bucket[i] = shared.buckets[part.found[i] & 255];
        }
        read_positions(part);
        return part;
    }

    // Half the bias of a part, as [4 kCount blocks of 8 columns][32 lanes] of (row r: columns c, c + 1; row r + 8: c, c + 1)
    // with r = lane / 4 and c = lane % 4 * 2. Without a pair that is wanted nothing is written.
    template <int kCount>
    __device__ __forceinline__ void write(const Part<kCount>& part, float4* to) const {
        constexpr int kSize = 16 * kCount;
        int most = part.found[0] >> kKindShift;
#pragma unroll
        for (int i = 1; i < kCount; ++i) most = max_of(most, part.found[i] >> kKindShift);
        if (most == kNothing) return;
        float x[kSize];  // [4 n + 2 half + c]
#pragma unroll
        for (int i = 0; i < kSize; ++i)
            x[i] = fmaf(0.5f, part.band[i / 2 % 2 - i / 4 + 4 * kCount - 1][i % 2],
                        most <= kMaxEdges ? part.bucket[i / 16].value : 0.0f);
        if (most > 0) {
            if (most <= kLookUp)
                add_times(x, part, most);
            else
                add_exactly(x, part);
        }
#pragma unroll
        for (int n = 0; n < 4 * kCount; ++n)
            to[n * 32 + lane()] = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }
    __device__ __forceinline__ void write(int group, int piece, float4* to) const { write(read<1>(group, piece), to); }

  private:
    // Kinds of pieces: up to kMaxEdges edges, or how to look up.
    static constexpr int kNothing = -1, kMaxEdges = 3, kLookUp = 4, kIntegers = 5, kWide = 6, kKindShift = 8;

    struct Range {
        float low, high;
    };

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
        for (int q = thread; q < Shared::kQuarters; q += kWarpgroup) {
            const TimeQuarter& quarter = kQuartersOfTime.at[min_of(q, 255)];
            shared.quarters[q] = {static_cast<float>(quarter.edge_low), half(quarter.bucket), half(quarter.bucket + 1),
                                  quarter.bucket};
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
    __device__ __forceinline__ void read_col_times(int first) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
            col_time[piece] = __ldg(sides.col_times + min_of(first + piece * kPieceCols + lane(), sides.num_cols - 1));
    }

    // This lane's piece: the first bucket that can occur, and its kind.
    __device__ __forceinline__ int describe(const Range& cols) const {
        if (!overlaps(wanted, col0 + piece_of_lane() * kPieceCols, kPieceCols)) return kNothing * (1 << kKindShift);
        if (sides.time == nullptr) return 0;
        const float low = fmaxf(0.0f, fmaxf(rows.low - cols.high, cols.low - rows.high));
        const float high = fmaxf(rows.high - cols.low, cols.high - rows.low);
        const float largest = fmaxf(fmaxf(fabsf(rows.low), fabsf(rows.high)), fmaxf(fabsf(cols.low), fabsf(cols.high)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float slack = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        int first, last;
        if (exact) {
            const auto bucket = [&](float x) {
                const typename Shared::Quarter quarter = shared.quarters[quarter_of(x)];
                return quarter.bucket + (x >= quarter.edge ? 1 : 0);
            };
            first = bucket(low), last = bucket(high);
        } else {
            first = bucket_of(static_cast<uint64_t>(__float2ull_rz(fmaxf(low - slack, 0.0f))));
            last = bucket_of(static_cast<uint64_t>(__float2ull_rz(high + slack)));
        }
        first = min_of(first, sides.num_buckets), last = min_of(last, sides.num_buckets);
        int kind = last - first;
        if (kind > 0 && !exact)
            kind = high + slack < 0x1p31f ? kIntegers : kWide;
        else if (kind > kMaxEdges)
            kind = kLookUp;
        return first | kind << kKindShift;
    }

    template <int kCount>
    __device__ __forceinline__ void read_positions(Part<kCount>& part) const {
        constexpr int kDiagonals = 4 * kCount + 1, kSign = kRowsAreKeys ? -1 : 1;
        const int row = first_row(row0, part.group), col = col0 + part.first * kPieceCols;
        const auto place = [](int k) { return kSign * ((k / 2 - 4 * kCount + 1) * 8 - k % 2); };
        if (sides.position == nullptr) {
#pragma unroll
            for (int k = 0; k < 2 * kDiagonals; ++k) part.band[k / 2][k % 2] = 0.0f;
            return;
        }
        const int corner = sides.distance(row, col), at = sides.distance(row + lane() / 4, col + lane() % 4 * 2);
        const int cols = kCount * kPieceCols - 1;
        const int farthest = kRowsAreKeys ? max_of(15 - corner, corner + cols) : max_of(corner + 15, cols - corner);
        if (farthest <= sides.reach) {
            const float* from = sides.position + at;
#pragma unroll
            for (int k = 0; k < 2 * kDiagonals; ++k) part.band[k / 2][k % 2] = __ldg(from + place(k));
        } else {
#pragma unroll
            for (int k = 0; k < 2 * kDiagonals; ++k)
                part.band[k / 2][k % 2] = __ldg(sides.position + clamp_to(at + place(k), -sides.reach, sides.reach));
        }
    }

    // The time bias from differences in fp32: above a piece's first bucket, or all of it.
    template <int kCount>
    __device__ __forceinline__ void add_times(float (&x)[16 * kCount], const Part<kCount>& part, int most) const {
        const float* row_times = shared.row_times[warp()] + part.group * 16 + lane() / 4;
        const float* col_times = shared.col_times[warp()] + part.first * kPieceCols + lane() % 4 * 2;
        const float of_row[2] = {row_times[0], row_times[8]};
        float t[16 * kCount];
#pragma unroll
        for (int n = 0; n < 4 * kCount; ++n) {
            const float2 of_col = *reinterpret_cast<const float2*>(col_times + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i) t[4 * n + i] = fabsf(of_row[i / 2] - (i % 2 ? of_col.y : of_col.x));
        }
        if (most == kLookUp) {
#pragma unroll
            for (int i = 0; i < 16 * kCount; ++i) {
                const typename Shared::Quarter quarter = shared.quarters[quarter_of(t[i])];
                x[i] += t[i] >= quarter.edge ? quarter.above : quarter.below;
            }
            return;
        }
        typename Shared::Bucket bucket[kCount];
#pragma unroll
        for (int piece = 0; piece < kCount; ++piece) bucket[piece] = part.bucket[piece];
#pragma unroll 1
        for (int edge = 1;; ++edge) {
            typename Shared::Bucket next[kCount];
#pragma unroll
            for (int piece = 0; piece < kCount; ++piece) {
                next[piece] = shared.buckets[(part.found[piece] & 255) + edge];
                const float step = edge <= part.found[piece] >> kKindShift ? bucket[piece].step : 0.0f;
#pragma unroll
                for (int i = 16 * piece; i < 16 * piece + 16; ++i)
                    x[i] = fmaf(__saturatef(t[i] + bucket[piece].before_edge), step, x[i]);
            }
            if (edge == most) break;
#pragma unroll
            for (int piece = 0; piece < kCount; ++piece) bucket[piece] = next[piece];
        }
    }

    // All of it, from differences of integers. Seldom: a loop keeps the code small.
    template <int kCount>
    __device__ __forceinline__ void add_exactly(float (&x)[16 * kCount], const Part<kCount>& part) const {
        const int row = first_row(row0, part.group) + lane() / 4;
        const int64_t of_row[2] = {__ldg(sides.row_times + min_of(row, sides.num_rows - 1)),
                                   __ldg(sides.row_times + min_of(row + 8, sides.num_rows - 1))};
#pragma unroll 1
        for (int n = 0; n < 4 * kCount; ++n) {
            const int col = col0 + part.first * kPieceCols + n * 8 + lane() % 4 * 2;
            float add[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t of_col = __ldg(sides.col_times + min_of(col + i % 2, sides.num_cols - 1));
                add[i] = shared.buckets[bucket_of(time_difference(of_row[i / 2], of_col))].value;
            }
#pragma unroll
            for (int i = 0; i < 16 * kCount; ++i)
                if (i / 4 == n) x[i] += add[i % 4];
        }
    }

    Shared& shared;
    Sides sides;
    const int named_barrier;
    int row0 = 0, col0 = 0, described = 0;
    Spans wanted;  // of this lane's piece, as the times of its rows
    Range rows = {};
    int64_t base = 0;                // the block's first time
    int64_t col_time[kPieces] = {};  // of the tile to come
};

}  // namespace hstu::attention::sm90
