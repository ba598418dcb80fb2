// The gradient of the position table of the relative bias, added up in the key warpgroups of the sm90 backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d
//
// A thread has G in fp32 for the 8 x 8 blocks of its warp's 16 keys, a query tile after another, while products are under
// way. Blocks on the same diagonal are added first. Through shared memory each lane then gets what all keys have of its
// distances, which it adds to global memory. Tiles beyond the table's reach are one sum until the work's end.
// Global sums are added to by atomics in no fixed order: the sm80 family serves deterministic calls (api.cpp).
#pragma once

#include "attention/sm90/backward_bias.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm90 {

// Of a warp's 16 keys of a work.
template <class Bias>
struct KeySums {
    static constexpr int kQueries = Bias::kQueries;

    Bias& shared;
    const int strip;
    float* positions;                   // of this head, at distance 0; nullptr where not wanted
    float before = 0.0f, after = 0.0f;  // clipped distances: at -reach and at reach

    __device__ __forceinline__ KeySums(Bias& shared, int strip, const BackwardParams& p, int head)
        : shared(shared), strip(strip),
          positions(TableGradients(p, head, static_cast<int>(blockIdx.x) % kTableCopies).position) {}

    // g: 2 G N. corner: the distance of the first key and query.
    __device__ __forceinline__ void add(const Accumulator<kQueries>& g, const BackwardParams& p, int corner) {
        if (positions == nullptr) return;
        const int reach = p.relative.reach;
        const bool far = corner - 15 >= reach;
        if (far || corner + kQueries - 1 <= -reach) {
            float part[4] = {};
#pragma unroll
            for (int i = 0; i < kQueries / 2; ++i) part[i % 4] += g.x[i];
            (far ? after : before) += (part[0] + part[1]) + (part[2] + part[3]);
            return;
        }
        // sum[k] is for the distance corner + 8 (k - 1) + column - row of the thread's place in a block.
        constexpr int kCols = Bias::kDiagonalCols;
        float2 sum[kCols / 8] = {};
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
            float2& to = sum[i / 4 + 1 - i / 2 % 2];
            (i % 2 ? to.y : to.x) += g.x[i];
        }
        const int lane = lane_anew();
        float* const diagonals = &shared.diagonals[strip][0][0];
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kCols / 8; ++k)
            *reinterpret_cast<float2*>(diagonals + lane / 4 * kCols + 8 * k + lane % 4 * 2) = sum[k];
        __syncwarp();
        // The distance corner + j - 15 is in column j - 7 + row.
        const float scale = 0.5f * p.inv_scaling;
        const bool within = corner - 15 >= -reach && corner + kQueries <= reach;
#pragma unroll
        for (int first = 0; first < kCols + 7; first += 32) {
            const int j = first + lane, distance = corner + j - 15;
            float x[8];
#pragma unroll
            for (int row = 0; row < 8; ++row) {
                const int col = j - 7 + row;
                const bool inside = (first >= 7 || col >= 0) && (first + 32 + row <= kCols + 7 || col < kCols);
                x[row] = inside ? diagonals[row * kCols + col] : 0.0f;
            }
            const float of_distance = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
            if (j < kCols + 7)
                add_to_global(positions + (within ? distance : clamp_to(distance, -reach, reach)), scale * of_distance);
        }
    }
    // At the end of a work.
    __device__ __forceinline__ void finish(const BackwardParams& p) const {
        if (positions == nullptr) return;
        const float low = sum_of_warp(before), high = sum_of_warp(after), scale = 0.5f * p.inv_scaling;
        if (lane() != 0) return;
        add_to_global(positions - p.relative.reach, scale * low);
        add_to_global(positions + p.relative.reach, scale * high);
    }

  private:
    static __device__ __forceinline__ float sum_of_warp(float x) {
        for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
        return x;
    }
};

// Without a relative bias.
struct NoKeySums {
    template <class... Args>
    __device__ __forceinline__ explicit NoKeySums(const Args&...) {}
};

}  // namespace hstu::attention::sm90
