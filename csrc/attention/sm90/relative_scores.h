// What a consumer warp of the sm90 forward does with the relative bias of its 16 rows (relative.h): most of it is where
// scores begin, so that it needs no registers of its own; a constant is added in the activation.
#pragma once

#include "attention/activation.h"
#include "attention/sm90/product.h"
#include "attention/sm90/relative.h"

namespace hstu::attention::sm90 {

// One tile. Values: hands out the next 16 x 32 values of this warp, float4 values(n) of block n, between begin() and end().
template <class Shared>
class BiasOfTile {
  public:
    using Place = typename Shared::Place;
    using Tile = typename Shared::Tile;
    static constexpr int kPieces = Shared::kPieces, kCols = Shared::kCols;

    __device__ __forceinline__ BiasOfTile(const Place& place, const Tile& tile, int group)
        : place(place), tile(tile), group(group) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) pieces[i] = {tile.pieces[group * 4 + threadIdx.x / 32 % 4][i]};
    }

    // What S begins with.
    template <class Values>
    __device__ __forceinline__ void begin_scores(Accumulator<kCols>& s, Values& values) const {
        const WindowReader<Shared> window(tile, group);
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
            const float2 above = window.pair(n), below = window.pair(n - 1);
            s.x[4 * n] = above.x, s.x[4 * n + 1] = above.y, s.x[4 * n + 2] = below.x, s.x[4 * n + 3] = below.y;
        }
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            float* const x = s.x + 16 * piece;
            const PieceTimes found = pieces[piece];
#pragma unroll 1
            for (int edge = 0; edge < found.edges(); ++edge) add_step(x, piece, found, edge);
            if (found.has_values()) {
                values.begin();
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float4 four = values(n);
                    x[4 * n] = four.x, x[4 * n + 1] = four.y, x[4 * n + 2] = four.z, x[4 * n + 3] = four.w;
                }
                values.end();
            }
        }
    }
    // Half of what the activation adds to the columns of each piece.
    __device__ __forceinline__ void read_constants(float (&constants)[kPieces]) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int top = pieces[i].is_earlier() ? pieces[i].edges() : 0;
            const float half = place.buckets[pieces[i].bucket() + top].half;
            constants[i] = pieces[i].has_values() ? 0.0f : half;
        }
    }

  private:
    // Added where a row's integer is at least a column's: rows - edge >= columns where rows are later, and
    // rows + edge > columns, which takes it back, where they are earlier.
    __device__ __forceinline__ void add_step(float* x, int piece, PieceTimes found, int edge) const {
        const typename Shared::Bucket bucket = place.buckets[found.bucket() + edge];
        const uint32_t* const words = place.row_words + group * 64 + threadIdx.x / 32 % 4 * 16 + lane() / 4;
        const uint32_t shift = tile.bases[piece] + (found.is_earlier() ? 1 - bucket.edge : bucket.edge);
        const int of_row[2] = {static_cast<int>(words[0] - shift), static_cast<int>(words[8] - shift)};
        const float step = found.is_earlier() ? -bucket.step : bucket.step;
        const int* const near = tile.near + piece * kPieceCols + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int2 of_col = *reinterpret_cast<const int2*>(near + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (of_row[i / 2] >= (i % 2 ? of_col.y : of_col.x)) x[4 * n + i] += step;
        }
    }

    const Place& place;
    const Tile& tile;
    const int group;
    PieceTimes pieces[kPieces];
};

// S -> P N = silu(alpha S + constants), 0 where masked.
template <bool kMasked, int kCols, class Mask>
__device__ __forceinline__ void activate_with_constants(Accumulator<kCols>& s,
                                                        const float (&constants)[kCols / kPieceCols], const Mask& mask,
                                                        int row0, int col0, float half_alpha) {
    const typename Mask::Row rows[2] = {mask.row(row0), mask.row(row0 + 8)};
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
        float x = fmaf(half_alpha, s.x[i], constants[i / 16]);
        if constexpr (kMasked) x = rows[i / 2 % 2].keeps(col0 + i / 4 * 8 + i % 2) ? x : 0.0f;
        s.x[i] = silu_of_twice(x);
    }
}

}  // namespace hstu::attention::sm90
