// The relative bias in the sm90 backward: what a stage of queries brings for it, and its values in S^T.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// The warp that fetches Q and dO also writes notes on each tile (QueryDescriber): a window of the position table, from the
// last key and first query to the first key and last query; the times of the queries, counted from that of the block's first
// key; and which buckets can occur in each piece of 16 keys and 32 queries, from the ranges of the times on both sides.
// A key warp adds half the bias to its 16 rows of S^T (KeyBias), all of it known to be alike in the warp but the values:
//   positions   blocks of 8 x 8 on the same diagonal share a pair of the window's values a thread
//   times       one bucket: a constant. More: a look-up of the difference's quarter of an octave (time_bucket.h) in shared
//               memory. Differences are in fp32, exact below 2^24; above, an element near an edge leaves its bucket in
//               doubt, and the warp's piece is done again in 64 bits, as are differences past the tables.
#pragma once

#include "attention/bias.h"
#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"
#include "attention/sm90/product.h"
#include "attention/sm90/relative.h"
#include "attention/time_lookup.h"

namespace hstu::attention::sm90 {

// The buckets that can occur in a piece.
struct PieceCode {
    static constexpr int kWide = 1 << 16;

    int code;

    __device__ __forceinline__ int first() const { return code & 255; }
    __device__ __forceinline__ int last() const { return code >> 8 & 255; }
    __device__ __forceinline__ bool one() const { return first() == last(); }
    __device__ __forceinline__ bool wide() const { return code & kWide; }
};

// In shared memory. Values are halved.
template <int kKeys_, int kQueries_, int kStages, int kBuckets_>
struct BackwardBias {
    static constexpr int kBuckets = kBuckets_;  // that have a place in the sums of a lane; wide pieces reach others
    static constexpr int kKeys = kKeys_, kQueries = kQueries_, kWindow = kKeys + kQueries;
    static constexpr int kStrips = kKeys / 16, kPieceSize = 32, kPieces = kQueries / kPieceSize;
    static_assert(kStrips * kPieces <= 32);

    struct Notes {
        // [kKeys - 1 - key + query], and the same a word later, so that the pair of any two neighbours is aligned in one.
        alignas(8) float window[2][kWindow + 2];
        alignas(8) float times[kQueries];
        int found[kStrips * kPieces];    // PieceCode
        float slack[kStrips * kPieces];  // what a difference may be off by, or less than 0
    };
    struct alignas(16) Quarter {
        float edge;
        int place;  // in bytes, of the bucket below the edge in a column of sums
        float below, above;
    };

    Notes notes[kStages];
    float key_times[2][kKeys];  // of a work, counted as the queries' are
    float values[kTimeBuckets];
    static constexpr int kQuarters = 4 * 37;
    static_assert(kTimeEdges[kBuckets] < uint64_t{1} << 37);
    Quarter quarters[kQuarters];
    // Of each warp: sums of 2 G by bucket, a column a lane; and sums of a tile's blocks of 8 x 8 by their diagonals, a row a
    // key and a column a query.
    static constexpr int kRowBytes = 32 * sizeof(float);
    float sums[kStrips][kBuckets][32];
    static constexpr int kDiagonalCols = kQueries + 8;
    alignas(8) float diagonals[kStrips][8][kDiagonalCols];
};

template <class Mask>
struct KeyWork;

template <class Mask>
__device__ __forceinline__ RelativeSides<true> sides_of(const BackwardParams& p, const KeyWork<Mask>& work) {
    return {p.relative, work.head, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k};
}

// One warp: the notes on one query tile of a work after another.
template <class Bias>
struct QueryDescriber {
    static constexpr int kLanes = Bias::kStrips * Bias::kPieces;

    struct Range {
        float low, high;
    };
    Spans wanted = {};  // the queries that keep any of this lane's 16 keys
    Range keys = {};
    int64_t base = 0;  // the time of the block's first key

    static __device__ __forceinline__ int strip() { return lane() % kLanes / Bias::kPieces; }
    static __device__ __forceinline__ int piece() { return lane() % Bias::kPieces; }

    template <class Mask>
    __device__ __forceinline__ void begin_work(float* times, const BackwardParams& p, const KeyWork<Mask>& work) {
        const auto sides = sides_of(p, work);
        if (sides.time == nullptr) return;
        wanted = work.mask.q_range(work.col0 + 16 * strip(), 16);
        base = __ldg(sides.row_times + min_of(work.col0, sides.num_rows - 1));
#pragma unroll
        for (int first = 0; first < Bias::kKeys; first += 32) {
            const int row = min_of(work.col0 + first + lane(), sides.num_rows - 1);
            const float t = time_from(base, __ldg(sides.row_times + row));
            times[first + lane()] = t;
            Range range{t, t};
#pragma unroll
            for (int step = 1; step < 16; step *= 2) {
                range.low = fminf(range.low, __shfl_xor_sync(0xffffffff, range.low, step));
                range.high = fmaxf(range.high, __shfl_xor_sync(0xffffffff, range.high, step));
            }
            const int from = strip() * 16 - first;
            const float low = __shfl_sync(0xffffffff, range.low, from & 31);
            const float high = __shfl_sync(0xffffffff, range.high, from & 31);
            if (from >= 0 && from < 32) keys = {low, high};
        }
    }
    template <class Mask>
    __device__ __forceinline__ void describe(typename Bias::Notes& to, const BackwardParams& p,
                                             const KeyWork<Mask>& work, int query0) const {
        constexpr int kReads = Bias::kWindow / 32;
        const auto sides = sides_of(p, work);
        float position[kReads];
#pragma unroll
        for (int i = 0; i < kReads; ++i) {
            const int distance = query0 + sides.offset - work.col0 - (Bias::kKeys - 1) + 32 * i + lane();
            position[i] = sides.position ? __ldg(sides.position + clamp_to(distance, -sides.reach, sides.reach)) : 0.0f;
        }
        int found = 0;
        float slack = -1.0f;
        if (sides.time != nullptr) {
            Range queries = {};
#pragma unroll
            for (int i = 0; i < Bias::kPieces; ++i) {
                const int col = min_of(query0 + Bias::kPieceSize * i + lane(), sides.num_cols - 1);
                const float t = time_from(base, __ldg(sides.col_times + col));
                to.times[Bias::kPieceSize * i + lane()] = t;
                const int low = __reduce_min_sync(0xffffffff, ordered(t));
                const int high = __reduce_max_sync(0xffffffff, ordered(t));
                if (i == piece()) queries = {from_ordered(low), from_ordered(high)};
            }
            if (overlaps(wanted, query0 + Bias::kPieceSize * piece(), Bias::kPieceSize))
                found = find(queries, sides.num_buckets, slack);
        }
        if (lane() < kLanes) to.found[lane()] = found, to.slack[lane()] = slack;
#pragma unroll
        for (int i = 0; i < kReads; ++i)
            to.window[0][32 * i + lane()] = to.window[1][32 * i + lane() + 1] = 0.5f * position[i];
    }

  private:
    // Integers in the order of floats.
    static __device__ __forceinline__ int ordered(float x) {
        const int bits = __float_as_int(x);
        return bits ^ (bits >> 31 & 0x7fffffff);
    }
    static __device__ __forceinline__ float from_ordered(int order) {
        return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
    }
    __device__ __forceinline__ int find(const Range& queries, int num_buckets, float& slack) const {
        const float low = fmaxf(keys.low - queries.high, queries.low - keys.high);
        const float high = fmaxf(keys.high - queries.low, queries.high - keys.low);
        const float largest =
            fmaxf(fmaxf(fabsf(keys.low), fabsf(keys.high)), fmaxf(fabsf(queries.low), fabsf(queries.high)));
        const bool exact = fmaxf(largest, high) < 0x1p24f - 4.0f;
        const float error = exact ? 0.0f : fmaf(largest, 0x1p-21f, 4.0f);
        const bool wide = high + error >= static_cast<float>(kTimeEdges[Bias::kBuckets] - 1);
        if (!exact) slack = error;
        const auto bucket = [&](float x) {
            return min_of(bucket_of(static_cast<uint64_t>(__float2ull_rz(fmaxf(x, 0.0f)))), num_buckets);
        };
        return bucket(low - error) | bucket(high + error) << 8 | (wide ? PieceCode::kWide : 0);
    }
};

// A warp's 16 keys of a work. Element i of a piece is S^T's [16 * piece + i]: key i / 2 % 2 of the thread's two, query
// 8 * (i / 4) + i % 2 from its first.
template <class Bias>
struct KeyBias {
    using Notes = typename Bias::Notes;
    using Quarter = typename Bias::Quarter;
    static constexpr int kPieces = Bias::kPieces;

    Bias& shared;
    const int strip, number;  // of which work in shared memory

    __device__ __forceinline__ KeyBias(Bias& shared, int strip, int number)
        : shared(shared), strip(strip), number(number) {}

    __device__ __forceinline__ PieceCode code_of(const Notes& notes, int piece) const {
        return {notes.found[strip * kPieces + piece]};
    }

    // S^T -> half of (alpha S^T + bias).
    template <int kRows, class Mask>
    __device__ __forceinline__ void add_half(Accumulator<kRows>& s, const Notes& notes, const BackwardParams& p,
                                             const KeyWork<Mask>& work, int query0) const {
        static_assert(kRows == Bias::kQueries);
        const float half_alpha = 0.5f * p.alpha;
        const int lane = lane_anew(), place = Bias::kKeys - 1 - (16 * strip + lane / 4) + lane % 4 * 2;
        const float* const from = notes.window[place % 2] + place + place % 2;
        const auto pair = [&](int n) { return *reinterpret_cast<const float2*>(from + 8 * n); };
        float2 below = pair(-1);  // of the key 8 further
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const PieceCode code = code_of(notes, piece);
            const float constant = code.one() ? shared.values[code.first()] : 0.0f;
            below.x += constant, below.y += constant;
            float* const x = s.x + 16 * piece;
            float2 above = {};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                above = pair(4 * piece + n);
                const float2 next = above;
                above.x += constant, above.y += constant;
                x[4 * n] = fmaf(half_alpha, x[4 * n], above.x);
                x[4 * n + 1] = fmaf(half_alpha, x[4 * n + 1], above.y);
                x[4 * n + 2] = fmaf(half_alpha, x[4 * n + 2], below.x);
                x[4 * n + 3] = fmaf(half_alpha, x[4 * n + 3], below.y);
                below = n < 3 ? above : next;
            }
        }
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const PieceCode code = code_of(notes, piece);
            if (code.one()) continue;
            float* const x = s.x + 16 * piece;
            float value[16];
            const auto take = [&](int i, bool past, const Quarter& quarter) {
                value[i] = past ? quarter.above : quarter.below;
            };
            if (look_up(notes, code, piece, take)) {
#pragma unroll
                for (int i = 0; i < 16; ++i) x[i] += value[i];
            } else {
                find_buckets(piece, p, work, query0, [&](int n, const int (&bucket)[4]) {
                    float found[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) found[i] = shared.values[bucket[i]];
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        if (i / 4 == n) x[i] += found[i % 4];
                });
            }
        }
    }

  protected:
    // take(element, is it past the edge, its quarter) for a piece's elements, unless the warp has one that fp32 leaves in
    // doubt. An edge lies at a quarter's start or farther from it than a 500th, so small differences are in doubt too.
    template <class Take>
    __device__ __forceinline__ bool look_up(const Notes& notes, PieceCode code, int piece, const Take& take) const {
        if (code.wide()) return false;
        const int lane = lane_anew();
        const float* const key_times = shared.key_times[number] + 16 * strip + lane / 4;
        const float* const query_times = notes.times + piece * Bias::kPieceSize + lane % 4 * 2;
        const float of_key[2] = {key_times[0], key_times[8]};
        const float slack = notes.slack[strip * kPieces + piece], least = 1024.0f * slack;
        bool doubt = false;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float2 of_query = *reinterpret_cast<const float2*>(query_times + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float size = fabsf((i % 2 ? of_query.y : of_query.x) - of_key[i / 2]);
                const Quarter& quarter = shared.quarters[quarter_of(size)];
                doubt = doubt || size < least || fabsf(size - quarter.edge) <= slack;
                take(4 * n + i, size >= quarter.edge, quarter);
            }
        }
        return !__any_sync(0xffffffff, doubt);
    }
    // use(n, buckets of the elements 4 n to 4 n + 3), from differences in 64 bits. Seldom: a loop keeps the code small.
    template <class Mask, class Use>
    __device__ __forceinline__ void find_buckets(int piece, const BackwardParams& p, const KeyWork<Mask>& work,
                                                 int query0, const Use& use) const {
        const auto sides = sides_of(p, work);
        const int lane = lane_anew(), key = work.col0 + 16 * strip + lane / 4;
        const int query = query0 + piece * Bias::kPieceSize + lane % 4 * 2;
        const int64_t of_key[2] = {__ldg(sides.row_times + min_of(key, sides.num_rows - 1)),
                                   __ldg(sides.row_times + min_of(key + 8, sides.num_rows - 1))};
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            int bucket[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t of_query = __ldg(sides.col_times + min_of(query + 8 * n + i % 2, sides.num_cols - 1));
                bucket[i] = min_of(bucket_of(time_difference(of_query, of_key[i / 2])), sides.num_buckets);
            }
            use(n, bucket);
        }
    }
};

}  // namespace hstu::attention::sm90
