// The gradients of the tables of the relative bias, added up in the key warpgroups of the sm90 backward.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// A thread has G in fp32 for the 8 x 8 blocks of its warp's 16 keys, a query tile after another, while products are under
// way.
//   times       Of a piece (backward_bias.h) all elements, then those behind the first edge, behind the second, ...: a
//               bucket's sum is the difference of two. A sum that the tile ends with stays in a register until another bucket
//               has its turn; others go to shared memory, a place for each quad of lanes, and at the end to global memory.
//   positions   Blocks on the same diagonal are added first, then shuffles add what lanes hold of the same distance, and
//               eight lanes add each block's diagonals to global memory. Tiles beyond the table's reach are one sum.
// Global sums are added to by atomics, in fp32 or, where deterministic, exactly: all before has a fixed order.
#pragma once

#include "attention/sm90/backward_bias.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm90 {

// The sums hold 2 G N.
__device__ __forceinline__ TableGradients sums_of(const BackwardParams& p, int head) {
    TableGradients to(p, head, static_cast<int>(blockIdx.x) % kTableCopies);
    to.scale *= 0.5f;
    return to;
}

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {
    for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

template <class Bias>
struct KeySums : KeyBias<Bias> {
    using Base = KeyBias<Bias>;
    using Base::Base, Base::code_of, Base::read_times, Base::shared, Base::strip;
    using typename Base::Bucket, typename Base::Notes;
    static constexpr int kQueries = Bias::kQueries, kPieces = Bias::kPieces;

    float open = 0.0f;                 // of open_bucket, in this lane
    int open_bucket = 0;
    float before = 0.0f, after = 0.0f;  // clipped distances: at -reach and at reach

    // A quad's sum.
    __device__ __forceinline__ void keep(int bucket, float x) const {
        x = sum_of_lanes(x, 4);
        if (lane() % 4 == 0) shared.sums[strip][bucket][lane() / 4] += x;
    }

    template <class Mask>
    __device__ __forceinline__ void add(const Accumulator<kQueries>& g, const Notes& notes, const BackwardParams& p,
                                        const KeyWork<Mask>& work, int query0) {
        float total = 0.0f;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const float* const x = g.x + 16 * piece;
            float part[4] = {};
#pragma unroll
            for (int i = 0; i < 16; ++i) part[i % 4] += x[i];
            float left = (part[0] + part[1]) + (part[2] + part[3]);  // in the bucket at hand and behind it
            total += left;
            if (p.dtime == nullptr) continue;
            const PieceCode code = code_of(notes, piece);
            if (code.first() != code.last()) {
                float t[16];
                read_times(t, notes, code, piece, p, work, query0);
                // A bucket's sum is kept while the next one is made.
                float done = 0.0f;
                int done_bucket = code.first();
                Bucket bucket = shared.buckets[code.first()];
#pragma unroll 1
                for (int b = code.first(); b < code.last(); ++b) {
                    const float before_edge = code.exact() ? bucket.before_edge : static_cast<float>(-b);
                    bucket = shared.buckets[b + 1];
                    keep(done_bucket, done);
                    float behind[4] = {};
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        behind[i % 4] = fmaf(__saturatef(fabsf(t[i]) + before_edge), x[i], behind[i % 4]);
                    const float next = (behind[0] + behind[1]) + (behind[2] + behind[3]);
                    done = left - next, done_bucket = b;
                    left = next;
                }
                keep(done_bucket, done);
            }
            if (open_bucket != code.last()) {
                keep(open_bucket, open);
                open = 0.0f, open_bucket = code.last();
            }
            open += left;
        }
        if (p.dposition != nullptr)
            add_positions(g, total, p, work.head, query0 + work.mask.offset - work.col0 - 16 * strip);
    }

    // At the end of a work.
    __device__ __forceinline__ void finish(const BackwardParams& p, int head) {
        if (p.dtime != nullptr) keep(open_bucket, open);
        if (p.dposition == nullptr) return;
        const float low = sum_of_lanes(before, 32), high = sum_of_lanes(after, 32);
        if (lane() != 0) return;
        const TableGradients to = sums_of(p, head);
        to.add(to.position, to.exact_position, -p.relative.reach, low);
        to.add(to.position, to.exact_position, p.relative.reach, high);
    }

  private:
    // corner: the distance of the first key and query.
    __device__ __forceinline__ void add_positions(const Accumulator<kQueries>& g, float total, const BackwardParams& p,
                                                  int head, int corner) {
        const int reach = p.relative.reach;
        if (corner - 15 >= reach) {
            after += total;
            return;
        }
        if (corner + kQueries - 1 <= -reach) {
            before += total;
            return;
        }
        // sum[k] in lane (r, q) = (lane / 4, lane % 4) is for distance 2 q - r + 8 (k - 1), further[k] for one more.
        constexpr int kDiagonals = kQueries / 8 + 2;
        float sum[kDiagonals] = {}, further[kDiagonals] = {};
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) (i % 2 ? further : sum)[i / 4 + 1 - i / 2 % 2] += g.x[i];
        const int r = lane() / 4, q = lane() % 4;
        // Adds `part` of the lane that is `rows` further, where its distance is the same; lanes wrap around into the k before.
        const auto gather = [&](const float (&part)[kDiagonals], int rows, int columns) {
            float found[kDiagonals];
#pragma unroll
            for (int k = 0; k < kDiagonals; ++k) {
                const float sent = r < rows ? (k > 0 ? part[k > 0 ? k - 1 : 0] : 0.0f) : part[k];
                found[k] = __shfl_sync(0xffffffff, sent, (lane() + 4 * rows + columns) % 32);
            }
#pragma unroll
            for (int k = 0; k < kDiagonals; ++k) sum[k] += found[k];
        };
        gather(further, 1, 0);
        gather(sum, 2, 1);  // lanes with q = 0, 2 get those with q = 1, 3
        gather(sum, 4, 2);
        if (q != 0) return;
        const TableGradients to = sums_of(p, head);
        const int first = corner - r - 8;
        if (!p.deterministic && corner - 15 >= -reach && corner + kQueries <= reach) {
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
};

// Without a relative bias.
struct NoKeySums {
    template <class... Args>
    __device__ __forceinline__ explicit NoKeySums(const Args&...) {}
};

// A warp's sums by bucket: cleared, and handed on to global memory.
template <class Bias>
__device__ __forceinline__ void clear_time_sums(Bias& shared, int strip) {
    float* const sums = &shared.sums[strip][0][0];
    for (int i = lane(); i < kTimeBuckets * 8; i += 32) sums[i] = 0.0f;
    __syncwarp();
}
template <class Bias>
__device__ __forceinline__ void flush_time_sums(Bias& shared, int strip, const BackwardParams& p, int head) {
    if (p.dtime == nullptr) return;
    const TableGradients to = sums_of(p, head);
    __syncwarp();
#pragma unroll 1
    for (int b = lane(); b < kTimeBuckets; b += 32) {
        const float* const x = shared.sums[strip][b];
        const float sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        if (b <= p.relative.num_buckets) to.add(to.time, to.exact_time, b, sum);
    }
    __syncwarp();
    clear_time_sums(shared, strip);
}

// The tables of one head in shared memory, written by all threads of the key warpgroups (named barrier 1), and the sums by
// bucket that are for that head.
template <class Bias>
struct BiasTables {
    Bias& shared;
    int head = -1;

    __device__ __forceinline__ void take_head(const BackwardParams& p, int of, int strip) {
        constexpr int kThreads = 2 * kWarpgroup;
        const Relative& r = p.relative;
        const bool same = head >= 0 && (head == of || (r.time_head_stride == 0 && p.dtime_head_stride == 0));
        if (!same || p.deterministic) flush(p, strip);  // which works a block takes up depends on the GPU
        if (same) return;
        head = of;
        const float* const time = r.time ? static_cast<const float*>(r.time) + of * r.time_head_stride : nullptr;
        const auto half = [&](int b) { return time ? 0.5f * __ldg(time + min_of(b, r.num_buckets)) : 0.0f; };
        named_sync(1, kThreads);
        for (int b = threadIdx.x % kThreads; b < kTimeBuckets; b += kThreads) {
            const uint32_t edge = kEdgesOfTime.at[min_of(b + 1, kTimeBuckets - 1)];
            shared.buckets[b] = {half(b), 1.0f - static_cast<float>(edge), half(b + 1) - half(b)};
        }
        for (int i = threadIdx.x % kThreads; i < 4 * 24; i += kThreads) {
            const TimeQuarter& quarter = kQuartersOfTime.at[i];
            shared.quarters[i] = {static_cast<float>(quarter.edge_low), half(quarter.bucket), half(quarter.bucket + 1)};
        }
        named_sync(1, kThreads);
    }
    __device__ __forceinline__ void flush(const BackwardParams& p, int strip) {
        if (head >= 0) flush_time_sums(shared, strip, p, head);
    }
};

}  // namespace hstu::attention::sm90
