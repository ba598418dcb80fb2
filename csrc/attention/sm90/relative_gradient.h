// The gradient of the position table of the relative bias, as a warp of the SM90 backward adds it up from G^T.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d
//
// A warp takes a strip of a tile: 32 keys and kQueries queries. Elements are added up by products with matrices of 0 and 1
// on the tensor cores, whose sums are fp32: 8 x 8 blocks on the same diagonal of blocks add up to one, and shuffles then
// add what the lanes hold of the same distance. A strip out of the table's reach needs its sum alone.
#pragma once

#include "attention/sm90/backward_bias.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm90 {

// A right operand of k16 x n8 is two words a lane: rows 2 * (lane % 4) and the next, then those 8 further, of column
// lane / 4. These are of 8 rows: 1 on the diagonal, and 1 on and above it.
template <class T>
struct Ones {
    static constexpr uint32_t kLow = std::is_same_v<T, bf16> ? 0x3f80 : 0x3c00, kHigh = kLow << 16,
                              kBoth = kLow | kHigh;

    static __device__ __forceinline__ uint32_t diagonal(int lane) {
        const int row = lane % 4 * 2, col = lane / 4;
        return (row == col ? kLow : 0) | (row + 1 == col ? kHigh : 0);
    }
    static __device__ __forceinline__ uint32_t triangle(int lane) {
        const int row = lane % 4 * 2, col = lane / 4;
        return (row <= col ? kLow : 0) | (row + 1 <= col ? kHigh : 0);
    }
};

// 32 rows (keys) and kQueries columns of a tile of G^T, from (row, col) on. Nothing of it stays in registers.
template <class T, class Tile, int kQueries_>
struct GradientStrip {
    static constexpr int kKeys = 32, kQueries = kQueries_, kBlocks = kQueries / 8, kSteps = kQueries / 16;
    static_assert(Tile::kPanels == 1);
    Tile tile;
    int row, col;
    int lane = lane_anew();

    // Columns [16 step, 16 step + 16) of 16 rows as a left operand.
    __device__ __forceinline__ void load(uint32_t (&to)[4], int half, int step) const {
        read_blocks(to,
                    tile.address + Tile::chunk_offset(row + 16 * half + lane % 16, col + 16 * step + lane / 16 * 8));
    }
    // Blocks of 8 x 8 on diagonals of blocks: the n-th and the next one of diagonal k above those of diagonal k + 1. Diagonal
    // k has blocks with (queries - keys) = k - (kKeys / 8 - 1); 0 where it has no n-th.
    __device__ __forceinline__ void load_diagonals(uint32_t (&to)[4], int k, int n) const {
        constexpr int kLast = kKeys / 8 - 1;
        const auto first = [&](int diagonal) { return max_of(0, kLast - diagonal); };
        const int upper = lane / 8 % 2, right = lane / 16;
        const int keys = ((upper ? first(k + 1) : first(k)) + n + right) & kLast,
                  queries = (keys + k + upper - kLast) & (kBlocks - 1);
        read_blocks(to, tile.address + Tile::chunk_offset(row + 8 * keys + lane % 8, col + 8 * queries));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int diagonal = k + i % 2, of_keys = first(diagonal) + n + i / 2;
            if (of_keys > kLast || of_keys + diagonal - kLast >= kBlocks) to[i] = 0;
        }
    }
    // The sum of all, spread over the lanes.
    __device__ __forceinline__ float sum() const {
        const uint32_t ones = Ones<T>::diagonal(lane);
        float part[2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t left[4];
                load(left, half, step);
                multiply_blocks<T>(part[half], left, ones, ones);
            }
        }
        return ((part[0][0] + part[0][1]) + (part[0][2] + part[0][3])) +
               ((part[1][0] + part[1][1]) + (part[1][2] + part[1][3]));
    }
};

__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// A warp's sum of one entry of the position table, that of the distances at an end, spread over the lanes.
struct ClippedSum {
    int distance = 0;
    float sum = 0.0f;

    __device__ __forceinline__ void add(int of, float x, const TableGradients& to) {
        if (of != distance) flush(to), distance = of;
        sum += x;
    }
    __device__ __forceinline__ void flush(const TableGradients& to) {
        const float all = sum_over_lanes(sum);
        if (lane() == 0) to.add(to.position, to.exact_position, distance, all);
        sum = 0.0f;
    }
};

// The sums of a strip along its diagonals.
template <int kKeys, int kQueries>
struct DistanceSums {
    static constexpr int kFirst = kKeys / 8 - 1, kSlots = kFirst + kQueries / 8 + 1;
    static_assert(kSlots % 2 == 0);
    // at[k] in lane (r, q) = (lane / 4, lane % 4) is of distance corner + 8 (k - kFirst) + 2 q - r, next[k] of one more.
    float at[kSlots], next[kSlots];

    template <class T, class Tile>
    __device__ __forceinline__ explicit DistanceSums(const GradientStrip<T, Tile, kQueries>& strip) {
        const uint32_t ones = Ones<T>::diagonal(strip.lane);
#pragma unroll
        for (int k = 0; k < kSlots; k += 2) {
            float sums[4] = {};
#pragma unroll
            for (int n = 0; n <= kFirst; n += 2) {
                if (n > 0 && (k + 1 < n || k + n >= kSlots)) continue;  // neither diagonal is so long
                uint32_t left[4];
                strip.load_diagonals(left, k, n);
                multiply_blocks<T>(sums, left, ones, ones);
            }
            at[k] = sums[0], next[k] = sums[1], at[k + 1] = sums[2], next[k + 1] = sums[3];
        }
    }

    // corner: the distance of the strip's first key and query.
    __device__ __forceinline__ void add_to(const TableGradients& to, int corner, int reach) {
        const int lane = lane_anew(), r = lane / 4;
        // Adds `part` of the lane that is `rows` further, where its distance is the same; lanes wrap around into the next k.
        const auto gather = [&](const float* part, int rows, int columns) {
        // Downwards: at[k - 1] is still what it was.
#pragma unroll
            for (int k = kSlots - 1; k >= 0; --k) {
                const float sent = r < rows ? (k > 0 ? part[k - 1] : 0.0f) : part[k];
                at[k] += __shfl_sync(0xffffffff, sent, (lane + 4 * rows) % 32 + columns);
            }
        };
        gather(next, 1, 0);
        gather(at, 2, 1);  // lanes with q = 0, 2 get those with q = 1, 3
        gather(at, 4, 2);
        if (lane % 4 != 0) return;
        const int first = corner - 8 * kFirst - r;
        if (to.exact_position == nullptr && corner - kKeys >= -reach && corner + kQueries <= reach) {
#pragma unroll
            for (int k = 0; k < kSlots; ++k) add_to_global(to.position + first + 8 * k, to.scale * at[k]);
            return;
        }
#pragma unroll 1
        for (int k = 0; k < kSlots; ++k) {
            float x = 0.0f;
#pragma unroll
            for (int other = 0; other < kSlots; ++other) x = other == k ? at[other] : x;
            to.add(to.position, to.exact_position, clamp_to(first + 8 * k, -reach, reach), x);
        }
    }
};

}  // namespace hstu::attention::sm90
