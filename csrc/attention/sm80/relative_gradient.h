// The gradients of the tables of the relative bias, reduced inside the key-stationary blocks of the backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// Times: a thread adds up its elements of a bucket, in a register where a piece has one bucket and in shared memory where
// it has more; the warp adds these up, and lane b % 32 keeps the sum of bucket b in a register until the block ends. Positions: a thread adds up along the diagonals of its 8 x 8 blocks, shuffles add up
// what the lanes hold of the same distance, and each piece's sums go to global memory. Both are added there by atomics: in
// fp32, or where deterministic exactly (exact_sum.h), since all before has a fixed order.
#pragma once

#include "attention/sm80/relative.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm80 {

// Sums by bucket over one piece of a warp, in a column of shared memory for each lane: no other lane adds to it. The
// memory is that which the piece's P and G will be stored to, kM * 16 rows and 16 columns of two tiles one after the other.
// A bucket has one 16-byte chunk in each of 8 rows, so that the lanes meet no bank conflict.
template <class Tile, int kM>
struct BucketColumns {
    static constexpr int kBuckets = 8 * kM, kGroups = 2 * kM;  // groups of 8 rows
    static constexpr int kLanes = 32 / kBuckets;               // that add up the columns of one bucket

    uint32_t mine;  // this lane's place for bucket 0

    __device__ __forceinline__ explicit BucketColumns(uint32_t mine) : mine(mine) {}
    // The piece's first row and column in the tiles.
    __device__ __forceinline__ BucketColumns(Tile p, int row, int col)
        : mine(p.address + Tile::chunk_offset(row + lane() / 4, col) + lane() % 4 * 4) {}

    __device__ __forceinline__ static uint32_t offset(int bucket) {
        return bucket % kGroups * (8 * Tile::kRowBytes) + bucket / (2 * kGroups) * Tile::kBytes;
    }
    // A chunk and its right neighbour differ in one bit of their address.
    __device__ __forceinline__ uint32_t mine_of(int bucket) const {
        return (mine ^ bucket / kGroups % 2 << 4) + offset(bucket);
    }
    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int bucket = 0; bucket < kBuckets; ++bucket) store_shared(mine_of(bucket), 0.0f);
    }
    __device__ __forceinline__ void set(int bucket, float x) const { store_shared(mine_of(bucket), x); }
    __device__ __forceinline__ void add(int bucket, float x) const {
        const uint32_t at = mine_of(bucket);
        store_shared(at, load_shared(at) + x);
    }
    // Of bucket lane % kBuckets over all columns.
    __device__ __forceinline__ float sum() const {
        const int bucket = lane() % kBuckets, part = lane() / kBuckets;
        constexpr int kChunks = 8 / kLanes;
        float sum = 0.0f;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            // The chunk that lane 4 * row has its column in.
            const int row = part * kChunks + (i + bucket) % kChunks;
            const BucketColumns others(__shfl_sync(~0u, mine, 4 * row));
            const float4 x = load_shared4(others.mine_of(bucket));
            sum += (x.x + x.y) + (x.z + x.w);
        }
        for (int step = kBuckets; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        __syncwarp();
        return sum;
    }
};

// A warp's sums by bucket. Lane l has buckets l, l + 32, ...; the sum of one bucket is still spread over the lanes.
struct TimeSums {
    static constexpr int kSlots = ceil_div(kTimeBuckets, 32);
    float at[kSlots] = {};
    int bucket = 0;
    float open = 0.0f;

    __device__ __forceinline__ void add(int of, float x) {
        if (of != bucket) close(of);
        open += x;
    }
    __device__ __forceinline__ void close(int next) {
        for (int step = 16; step > 0; step /= 2) open += __shfl_xor_sync(~0u, open, step);
        keep(bucket, 1, open);
        bucket = next;
        open = 0.0f;
    }
    // Of `buckets` buckets from `first` on each lane has the sum of one, the same modulo `buckets` as its own.
    __device__ __forceinline__ void keep(int first, int buckets, float sum) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
            at[slot] += static_cast<uint32_t>(slot * 32 + lane() - first) < static_cast<uint32_t>(buckets) ? sum : 0.0f;
    }
    __device__ __forceinline__ void flush(const TableGradients& to, int num_buckets) {
        if (to.time == nullptr) return;
        close(0);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int b = slot * 32 + lane();
            if (b <= num_buckets) to.add(to.time, to.exact_time, b, at[slot]);
        }
    }

    // A piece's elements by their buckets, which lie from in.first to in.last.
    template <int kSize, class Columns>
    __device__ __forceinline__ void add_piece(const PieceBuckets& in, const float (&grad)[kSize],
                                              const int (&of)[kSize], const Columns& columns) {
        if (in.first == in.last) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum += grad[i];
            return add(in.first, sum);
        }
        if (in.last - in.first <= Columns::kBuckets / 2) {
            // Bucket by bucket: no addition waits for memory.
            columns.clear();
#pragma unroll 1
            for (int b = in.first; b <= in.last; ++b) {
                float sum[2] = {};
#pragma unroll
                for (int i = 0; i < kSize; ++i)
                    if (of[i] == b) sum[i % 2] += grad[i];
                columns.set(b - in.first, sum[0] + sum[1]);
            }
            const float sum = __shfl_sync(~0u, columns.sum(), (lane() - in.first) & 31);
            return keep(in.first, in.last - in.first + 1, sum);
        }
        for (int first = in.first & -Columns::kBuckets; first <= in.last; first += Columns::kBuckets) {
            columns.clear();
#pragma unroll
            for (int i = 0; i < kSize; ++i)
                if (static_cast<uint32_t>(of[i] - first) < Columns::kBuckets) columns.add(of[i] - first, grad[i]);
            keep(first, Columns::kBuckets, columns.sum());
        }
    }
};

// Adds the sums of a piece along its diagonals. `corner`: the distance of its first row and column.
template <class Piece>
__device__ __forceinline__ void add_distances(const Piece& grad, const TableGradients& to, int corner, int reach) {
    if (to.position == nullptr) return;
    // sum[k] in lane (r, q) = (lane / 4, lane % 4) is for distance r - 2 q + 8 (k - kN), below[k] for one less.
    constexpr int kDiagonals = Piece::kN + 2 * Piece::kM;
    float sum[kDiagonals + 1] = {}, below[kDiagonals + 1] = {};
#pragma unroll
    for (int m = 0; m < Piece::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < Piece::kN; ++n) {
                sum[2 * m + half - n + Piece::kN] += grad.x[m][n][half * 2];
                below[2 * m + half - n + Piece::kN] += grad.x[m][n][half * 2 + 1];
            }
        }
    }
    const int r = lane() / 4, q = lane() % 4;
    // Adds `part` of the lane that is `rows` further, where its distance is the same; lanes wrap around into the next k.
    const auto gather = [&](const float (&part)[kDiagonals + 1], int rows, int columns) {
        float found[kDiagonals];
#pragma unroll
        for (int k = 0; k < kDiagonals; ++k) {
            const float sent = r < rows ? part[k + 1] : part[k];
            found[k] = __shfl_sync(~0u, sent, (lane() + 4 * rows) % 32 + columns);
        }
#pragma unroll
        for (int k = 0; k < kDiagonals; ++k) sum[k] += found[k];
    };
    gather(below, 1, 0);
    gather(sum, 2, 1);  // lanes with q = 0, 2 get those with q = 1, 3
    gather(sum, 4, 2);
    if (q != 0) return;
    const int first = corner + r - 8 * Piece::kN;
    if (to.exact_position == nullptr && corner - 8 * Piece::kN >= -reach && corner + 16 * Piece::kM <= reach) {
#pragma unroll
        for (int k = 0; k < kDiagonals; ++k) atomicAdd(to.position + first + 8 * k, to.scale * sum[k]);
        return;
    }
#pragma unroll 1
    for (int k = 0; k < kDiagonals; ++k) {
        float x = 0.0f;
#pragma unroll
        for (int other = 0; other < kDiagonals; ++other) x = other == k ? sum[other] : x;
        to.add(to.position, to.exact_position, clamp_to(first + 8 * k, -reach, reach), x);
    }
}

}  // namespace hstu::attention::sm80
