// What a consumer warp of the sm90 forward does with the relative bias of its 16 rows (relative.h), before and with the
// activation of a tile of scores.
#pragma once

#include "attention/activation.h"
#include "attention/sm90/product.h"
#include "attention/sm90/relative.h"

namespace hstu::attention::sm90 {

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

// One tile. Values: reads the next 16 x 32 values of this warp, float4 values(n) of block n, between begin() and end().
template <class Shared>
class BiasOfTile {
  public:
    using Place = typename Shared::Place;
    using Tile = typename Shared::Tile;
    static constexpr int kPieces = Shared::kPieces, kCols = Shared::kCols;

    __device__ __forceinline__ BiasOfTile(const Place& place, const Tile& tile, int group)
        : place(place), tile(tile), group(group) {
        const int strip = group * 4 + threadIdx.x / 32 % 4;
        joined = {0};
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            pieces[i] = {tile.pieces[strip][i]};
            joined.code |= pieces[i].code;
        }
    }

    // S -> P N = silu(alpha S + bias), 0 where masked, for the warpgroup's rows from row0 on and the keys from col0 on.
    // kAny: by the code for all cases alone.
    template <bool kAny, class Mask, class Values>
    __device__ __forceinline__ void activate(Accumulator<kCols>& s, const Mask& mask, int row0, int col0,
                                             float half_alpha, Values& values) const {
        // Behind the last key there is a bias too.
        const bool masked = !mask.is_full(row0, 64, col0, kCols) || col0 + kCols > mask.len_k;
        if (!kAny && !masked && joined.code >> 8 == 0)
            activate_simply<0>(s, half_alpha);
        else if (!kAny && !masked && (joined.code & (PieceTimes::kSeveralEdges | PieceTimes::kValues)) == 0)
            activate_simply<1>(s, half_alpha);
        else
            activate_any(s, mask, masked, row0, col0, half_alpha, values);
    }

  private:
    // Without a mask or a branch, where no piece has more than kEdges edges, 0 or 1, nor values.
    template <int kEdges>
    __device__ __forceinline__ void activate_simply(Accumulator<kCols>& s, float half_alpha) const {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            float* const x = s.x + 16 * piece;
            const PieceTimes found = pieces[piece];
            const typename Shared::Bucket bucket = place.buckets[found.bucket()];
            if constexpr (kEdges == 0) {
                add_positions(x, piece, half_alpha, bucket.value);
            } else {
                Step step(*this, piece, bucket, found.is_earlier());
                step.size = found.edges() == 0 ? 0.0f : step.size;
                add_positions(x, piece, half_alpha, found.is_earlier() ? bucket.value - step.size : bucket.value);
                add_step(x, piece, step);
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = silu_of_twice(x[i]);
        }
    }
    template <class Mask, class Values>
    __device__ __forceinline__ void activate_any(Accumulator<kCols>& s, const Mask& mask, bool masked, int row0,
                                                 int col0, float half_alpha, Values& values) const {
        const int row = row0 + Accumulator<kCols>::row(), col = col0 + Accumulator<kCols>::col();
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            float* const x = s.x + 16 * piece;
            const PieceTimes found = pieces[piece];
            const int top = found.is_earlier() ? found.edges() : 0;
            const float value = place.buckets[found.bucket() + top].value;
            add_positions(x, piece, half_alpha, found.has_values() ? 0.0f : value);
#pragma unroll 1
            for (int edge = 0; edge < found.edges(); ++edge)
                add_step(x, piece, Step(*this, piece, place.buckets[found.bucket() + edge], found.is_earlier()));
            if (found.has_values()) {
                values.begin();
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float4 four = values(n);
                    x[4 * n] += four.x, x[4 * n + 1] += four.y, x[4 * n + 2] += four.z, x[4 * n + 3] += four.w;
                }
                values.end();
            }
            if (masked) {
                const typename Mask::Row rows[2] = {mask.row(row), mask.row(row + 8)};
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    x[i] = rows[i / 2 % 2].keeps(col + piece * kPieceCols + i / 4 * 8 + i % 2) ? x[i] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = silu_of_twice(x[i]);
        }
    }

    // Added where a row's integer is at least a column's: rows - edge >= columns where rows are later, and
    // rows + edge > columns, which takes it back, where they are earlier.
    struct Step {
        int of_row[2];
        float size;

        __device__ __forceinline__ Step(const BiasOfTile& bias, int piece, const typename Shared::Bucket& bucket,
                                        bool earlier) {
            const uint32_t* const words =
                bias.place.row_words + bias.group * 64 + threadIdx.x / 32 % 4 * 16 + lane() / 4;
            const uint32_t shift = bias.tile.bases[piece] + (earlier ? 1 - bucket.edge : bucket.edge);
            of_row[0] = static_cast<int>(words[0] - shift), of_row[1] = static_cast<int>(words[8] - shift);
            size = earlier ? -bucket.step : bucket.step;
        }
    };

    __device__ __forceinline__ void add_positions(float* x, int piece, float half_alpha, float value) const {
        const WindowReader<Shared> window(tile, group);
        float2 pairs[5];
#pragma unroll
        for (int n = 0; n < 5; ++n) {
            pairs[n] = window.pair(4 * piece + n - 1);
            pairs[n].x += value, pairs[n].y += value;
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float2 pair = pairs[i / 4 - i / 2 % 2 + 1];
            x[i] = fmaf(half_alpha, x[i], i % 2 ? pair.y : pair.x);
        }
    }
    __device__ __forceinline__ void add_step(float* x, int piece, const Step& step) const {
        const int* const near = tile.near + piece * kPieceCols + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int2 of_col = *reinterpret_cast<const int2*>(near + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (step.of_row[i / 2] >= (i % 2 ? of_col.y : of_col.x)) x[4 * n + i] += step.size;
        }
    }

    const Place& place;
    const Tile& tile;
    const int group;
    PieceTimes pieces[kPieces];
    PieceTimes joined;  // all of them
};

}  // namespace hstu::attention::sm90
