// The relative bias on a warp's share of a score tile, and the reduction of its gradient.
//
//   bias_ij = position[clip(p_i - j)] + time[bucket(|t_i - t_j|)]
//
// Nothing is kept in shared memory: tables and times are small, and are read through the L1 cache.
// A warp takes 16 columns of its share at a time, a piece: kernels loop over pieces, so that this code stands in them once.
// Positions: 8 x 8 blocks of a fragment with the same (row block - column block) share a value in each thread, so a thread
// reads two values a diagonal of blocks, not one an element.
// Times: From the ranges of the times of the warp's rows and of a piece's keys come the first and
// the last bucket that can occur in it. One bucket: a constant. A few: compared with the edges between them. Else each
// element looks up its quarter of an octave (time_bucket.h) and compares with the edge in it. Differences below 2^31 are
// taken modulo 2^32.
#pragma once

#include "attention/bias.h"
#include "attention/gpu.h"
#include "attention/time_lookup.h"

namespace hstu::attention::sm80 {

// Bounds of times, counted from a base. A time is off by at most 1 + 2^-24 of itself.
struct TimeRange {
    float low, high;

    __device__ __forceinline__ void join(float x) { low = fminf(low, x), high = fmaxf(high, x); }
    // Over lanes that differ in the bits below `lanes`.
    __device__ __forceinline__ void join_lanes(int lanes) {
        for (int step = 1; step < lanes; step *= 2) {
            low = fminf(low, __shfl_xor_sync(~0u, low, step));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
        }
    }
};

// The first and the last bucket of a piece, and whether its differences may need more than 31 bits.
struct PieceBuckets {
    int first, last;
    bool wide;

    __device__ __forceinline__ bool one() const { return first == last; }
};

// The bias on tiles of a block whose query rows (kRowsStay) or keys stay the same.
template <class Grid, bool kRowsStay>
struct RelativeTiles : RelativeBias<float> {
    static constexpr int kM = Grid::kM, kRows = kM * 16, kPieces = Grid::kN / 2, kPieceSize = kM * 8;
    static constexpr int kMaxEdges = 4;  // with more edges in a piece the look-up is cheaper
    static_assert(kRows <= 32 && kPieces <= 4 && 4 % kPieces == 0);

    int64_t half_base;
    TimeRange staying;

    __device__ RelativeTiles(const Params& p, const Sequence& s, int b, int h, int first) : RelativeBias(p, s, b, h) {
        if (time == nullptr) return;
        half_base = kRowsStay ? query_times[min_of(first, len_q - 1)] >> 1 : key_times[min_of(first, len_k - 1)] >> 1;
        staying = kRowsStay ? rows_range(first + Grid::row()) : keys_range(first + Grid::col());
    }

    // Element i of a piece, as s.x[m(i)][2 * piece + n(i)][half(i) * 2 + c(i)].
    static __device__ __forceinline__ int m(int i) { return i / 8; }
    static __device__ __forceinline__ int half(int i) { return i / 4 % 2; }
    static __device__ __forceinline__ int n(int i) { return i / 2 % 2; }
    static __device__ __forceinline__ int c(int i) { return i % 2; }

    // What is known of a warp's share of a tile before its pieces are looked at.
    struct TileTimes {
        int packed;                // lane 8 * piece has the buckets of that piece
        uint32_t queries[kM * 2];  // the low words of the times of this thread's rows
    };
    __device__ __forceinline__ TileTimes times_of(int row0, int col0) const {
        TileTimes of = {};
        if (time == nullptr) return of;
        const TimeRange rows = kRowsStay ? staying : rows_range(row0 + Grid::row());
        const TimeRange keys = kRowsStay ? keys_range(col0 + Grid::col()) : staying;
        const float largest = fmaxf(fmaxf(fabsf(rows.low), fabsf(rows.high)), fmaxf(fabsf(keys.low), fabsf(keys.high)));
        const float slack = fmaf(largest, 0x1p-21f, 2.0f);
        const float low = fmaxf(rows.low - keys.high, keys.low - rows.high) - slack;
        const float high = fmaxf(rows.high - keys.low, keys.high - rows.low) + slack;
        const int first = min_of(bucket_of(static_cast<uint64_t>(__float2ull_rz(fmaxf(low, 0.0f)))), num_buckets);
        const int last = min_of(bucket_of(static_cast<uint64_t>(__float2ull_rz(high))), num_buckets);
        of.packed = first | last << 8 | (high >= 0x1p31f ? 1 << 16 : 0);
#pragma unroll
        for (int r = 0; r < kM * 2; ++r) of.queries[r] = low_word(query_of(row0, r));
        return of;
    }
    // Half the position table along the diagonals of 8 x 8 blocks that a piece touches. at[k][c] is for row block m, half
    // and column block n with 2 m + half - n + 1 = k.
    struct Band {
        float at[2 * Grid::kM + 1][2];
    };
    __device__ __forceinline__ void read_band(Band& band, int piece, int row0, int col0) const {
        if (position == nullptr) return;
        const int corner = row0 + Grid::row() + offset - col0 - Grid::col() - piece * 16;  // of the piece's first pair
        const int distance = corner + lane() / 4 - lane() % 4 * 2 - 8;
        if (corner - 15 >= -reach && corner + kRows - 1 <= reach) {
            const float* from = position + distance;
#pragma unroll
            for (int k = 0; k <= 2 * Grid::kM; ++k)
#pragma unroll
                for (int c = 0; c < 2; ++c) band.at[k][c] = 0.5f * __ldg(from + 8 * k - c);
        } else {
#pragma unroll
            for (int k = 0; k <= 2 * Grid::kM; ++k)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    band.at[k][c] = 0.5f * __ldg(position + clamp_to(distance + 8 * k - c, -reach, reach));
        }
    }

    // What a piece needs of tables and times, read before the products that make its scores.
    struct Piece {
        int number;
        PieceBuckets in;
        Band band;
        uint32_t keys[4];  // the low words of the times of this thread's keys, with more than one bucket
    };
    __device__ __forceinline__ Piece piece(const TileTimes& times, int number, int row0, int col0) const {
        Piece piece{number, {}, {}, {}};
        read_band(piece.band, number, row0, col0);
        const int packed = __shfl_sync(~0u, times.packed, 8 * number);
        piece.in = {packed & 255, packed >> 8 & 255, packed >> 16 != 0};
        if (!piece.in.one()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) piece.keys[i] = low_word(key_of(number, col0, i));
        }
        return piece;
    }

    // S -> (alpha S + bias) / 2 on a piece, which is in the accumulator's column blocks from n0 on; with kKeep the buckets
    // of its elements are left in `bucket`, unless there is only one.
    template <bool kKeep, class Acc>
    __device__ __forceinline__ void add(Acc& s, int n0, const Piece& piece, const TileTimes& times, int row0, int col0,
                                        float half_alpha, int (&bucket)[kPieceSize]) const {
        const auto element = [&](int i) -> float& { return s.x[m(i)][n0 + n(i)][half(i) * 2 + c(i)]; };
        const PieceBuckets& in = piece.in;
        const bool few = in.one() || (!kKeep && !in.wide && in.last - in.first <= kMaxEdges);
        const float constant = few && time != nullptr ? __ldg(time + in.first) : 0.0f;
#pragma unroll
        for (int i = 0; i < kPieceSize; ++i)
            element(i) =
                fmaf(half_alpha, element(i), fmaf(0.5f, constant, piece.band.at[2 * m(i) + half(i) - n(i) + 1][c(i)]));
        if (in.one()) return;
        if (in.wide) return add_wide<kKeep>(s, n0, piece.number, row0, col0, bucket);

        uint32_t x[kPieceSize];
#pragma unroll
        for (int i = 0; i < kPieceSize; ++i)
            x[i] = static_cast<uint32_t>(abs(static_cast<int>(times.queries[i / 4] - piece.keys[i % 4])));
        if (!kKeep && few) {
            // Each edge is read while the one before it is compared with.
            const auto edge_of = [&](int b) { return __ldg(kEdgesOfTime.at + min_of(b, in.last)); };
            const auto time_of = [&](int b) { return __ldg(time + min_of(b, in.last)); };
            uint32_t edge = edge_of(in.first + 1);
            float below = constant, above = time_of(in.first + 1);
#pragma unroll 1
            for (int b = in.first + 1; b <= in.last; ++b) {
                const uint32_t next_edge = edge_of(b + 1);
                const float next = time_of(b + 1), step = 0.5f * (above - below);
#pragma unroll
                for (int i = 0; i < kPieceSize; ++i)
                    if (x[i] >= edge) element(i) += step;
                edge = next_edge, below = above, above = next;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPieceSize; ++i) {
                const int found = min_of(bucket_of(x[i]), num_buckets);
                if constexpr (kKeep) bucket[i] = found;
                element(i) = fmaf(0.5f, __ldg(time + found), element(i));
            }
        }
    }

  private:
    // The times of a piece whose differences need 64 bits. Seldom: row by row in a loop, which keeps the code small.
    template <bool kKeep, class Acc>
    __device__ __forceinline__ void add_wide(Acc& s, int n0, int number, int row0, int col0,
                                             int (&bucket)[kPieceSize]) const {
#pragma unroll 1
        for (int r = 0; r < kPieceSize; r += 4) {
            const int64_t query_time = __ldg(query_of(row0, r / 4));
            int found[4];
            float half_time[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                found[i] = min_of(bucket_of(time_difference(query_time, __ldg(key_of(number, col0, i)))), num_buckets);
                half_time[i] = 0.5f * __ldg(time + found[i]);
            }
#pragma unroll
            for (int i = 0; i < kPieceSize; ++i) {
                if (i / 4 * 4 != r) continue;
                s.x[m(i)][n0 + n(i)][half(i) * 2 + c(i)] += half_time[i % 4];
                if constexpr (kKeep) bucket[i] = found[i % 4];
            }
        }
    }
    __device__ __forceinline__ const int64_t* query_of(int row0, int r) const {
        return query_times + min_of(row0 + Grid::row() + r * 8 + lane() / 4, len_q - 1);
    }
    __device__ __forceinline__ const int64_t* key_of(int number, int col0, int i) const {
        const int col = col0 + Grid::col() + number * 16 + n(i) * 8 + lane() % 4 * 2 + c(i);
        return key_times + min_of(col, len_k - 1);
    }
    static __device__ __forceinline__ uint32_t low_word(const int64_t* t) {
        return __ldg(reinterpret_cast<const uint32_t*>(t));
    }
    __device__ __forceinline__ float from_base(int64_t t) const { return 2.0f * __ll2float_rn((t >> 1) - half_base); }
    __device__ __forceinline__ TimeRange rows_range(int row) const {
        const float t = from_base(__ldg(query_times + min_of(row + lane() % kRows, len_q - 1)));
        TimeRange range{t, t};
        range.join_lanes(kRows);
        return range;
    }
    // Lanes 8 * piece to 8 * piece + 7 have the range of a piece.
    __device__ __forceinline__ TimeRange keys_range(int col) const {
        const int first = col + lane() / 8 % kPieces * 16 + lane() % 8 * 2;
        const float t = from_base(__ldg(key_times + min_of(first, len_k - 1)));
        TimeRange range{t, t};
        range.join(from_base(__ldg(key_times + min_of(first + 1, len_k - 1))));
        range.join_lanes(8);
        return range;
    }
};

// A block's kernel-side form of a bias: RelativeTiles for the relative one, else the bias itself.
template <class Bias, class Grid, bool kRowsStay>
struct BlockBias : Bias {
    __device__ BlockBias(const Params& p, const Sequence& s, int b, int h, int) : Bias(p, s, b, h) {}
};
template <class Grid, bool kRowsStay>
struct BlockBias<RelativeBias<float>, Grid, kRowsStay> : RelativeTiles<Grid, kRowsStay> {
    using RelativeTiles<Grid, kRowsStay>::RelativeTiles;
};

}  // namespace hstu::attention::sm80
