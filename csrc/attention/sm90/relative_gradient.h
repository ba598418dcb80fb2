// The gradients of the tables of the relative bias, as a warp of the bias warpgroup adds them up from G^T.
//
//   dposition[d] = sum of G_ij with clip(p_i - j) = d      dtime[b] = sum of G_ij in bucket b
//
// A warp takes a strip of a tile: 32 keys and kQueries queries. Elements are added up by products with matrices of 0 and 1
// on the tensor cores, whose sums are fp32:
// Positions: 8 x 8 blocks on the same diagonal of blocks add up to one; shuffles then add what the lanes hold of the same
// distance.
// Times: sums along each key's queries in the order of their times. A lane has one key: a bucket's part of it lies between
// two places in that order, which are found by bisection, and is the difference of two sums, exactly 0 where they are one.
// Strips out of reach of the position table or within one bucket need their sum alone.
#pragma once

#include "attention/sm90/backward_kv.h"
#include "attention/table_gradients.h"

namespace hstu::attention::sm90 {

struct WideTimeEdges {
    uint64_t at[kTimeBuckets];

    constexpr WideTimeEdges() : at{} {
        for (int b = 0; b < kTimeBuckets; ++b) at[b] = kTimeEdges[b];
    }
};
static __device__ const WideTimeEdges kAllEdgesOfTime{};

// A right operand of k16 x n8 is two words a lane: rows 2 * (lane % 4) and the next, then those 8 further, of column
// lane / 4. These are of 8 rows: 1 on the diagonal, and 1 on and above it.
template <class T>
struct Ones {
    static constexpr uint32_t kLow = std::is_same_v<T, bf16> ? 0x3f80 : 0x3c00, kHigh = kLow << 16, kBoth = kLow | kHigh;

    static __device__ __forceinline__ uint32_t diagonal() {
        const int row = lane() % 4 * 2, col = lane() / 4;
        return (row == col ? kLow : 0) | (row + 1 == col ? kHigh : 0);
    }
    static __device__ __forceinline__ uint32_t triangle() {
        const int row = lane() % 4 * 2, col = lane() / 4;
        return (row <= col ? kLow : 0) | (row + 1 <= col ? kHigh : 0);
    }
};

// 32 rows (keys) of G^T.
template <class T, int kQueries>
struct GradientStrip {
    static constexpr int kKeys = 32, kBlocks = kQueries / 8, kSteps = kQueries / 16;
    Fragments<kSteps> of[2];  // 16 keys each

    template <class Tile>
    __device__ __forceinline__ void load(Tile tile, int row, int col) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
                read_blocks(of[m].x[step], matrix_address(tile, row + 16 * m, col + 16 * step));
    }
    // 8 keys x 8 queries.
    __device__ __forceinline__ uint32_t block(int keys, int queries) const {
        return of[keys / 2].x[queries / 2][queries % 2 * 2 + keys % 2];
    }
    // The sum of all, spread over the lanes.
    __device__ __forceinline__ float sum() const {
        const uint32_t ones = Ones<T>::diagonal();
        float part[2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_blocks<T>(part[m], of[m].x[step], ones, ones);
        return ((part[0][0] + part[0][1]) + (part[0][2] + part[0][3])) +
               ((part[1][0] + part[1][1]) + (part[1][2] + part[1][3]));
    }
};

__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// A warp's sums over one work: by bucket, in lane b % 32, and those of one entry that are still spread over the lanes.
struct TableSums {
    static constexpr int kSlots = ceil_div(kTimeBuckets, 32);
    float by_bucket[kSlots] = {};
    int bucket = 0, clipped = 0;  // the entries that these belong to
    float of_bucket = 0.0f, of_clipped = 0.0f;

    // Buckets first to first + 3; lane l has the sum of one, with the same remainder by 4.
    __device__ __forceinline__ void keep(int first, int buckets, float sum) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
            by_bucket[slot] +=
                static_cast<uint32_t>(slot * 32 + lane() - first) < static_cast<uint32_t>(buckets) ? sum : 0.0f;
    }
    __device__ __forceinline__ void add_to_bucket(int of, float x) {
        if (of != bucket) {
            keep(bucket, 1, sum_over_lanes(of_bucket));
            bucket = of, of_bucket = 0.0f;
        }
        of_bucket += x;
    }
    __device__ __forceinline__ void add_to_clipped(int distance, float x, const TableGradients& to) {
        if (distance != clipped) flush_clipped(to), clipped = distance;
        of_clipped += x;
    }
    __device__ __forceinline__ void flush_clipped(const TableGradients& to) {
        const float sum = sum_over_lanes(of_clipped);
        if (lane() == 0) to.add(to.position, to.exact_position, clipped, sum);
        of_clipped = 0.0f;
    }
    __device__ __forceinline__ void flush(const TableGradients& to, int num_buckets) {
        if (to.position != nullptr) flush_clipped(to);
        if (to.time == nullptr) return;
        add_to_bucket(-1, 0.0f);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int b = slot * 32 + lane();
            if (b <= num_buckets) to.add(to.time, to.exact_time, b, by_bucket[slot]);
        }
    }
};

// Adds the sums of a strip along its diagonals. `corner`: the distance of its first key and query.
template <class T, int kQueries>
__device__ __forceinline__ void add_distances(const GradientStrip<T, kQueries>& strip, const TableGradients& to,
                                              int corner, int reach) {
    using Strip = GradientStrip<T, kQueries>;
    constexpr int kKeyBlocks = Strip::kKeys / 8, kDiagonals = kKeyBlocks - 1 + Strip::kBlocks, kSlots = kDiagonals + 1;
    // at[k] in lane (r, q) = (lane / 4, lane % 4) is of distance corner + 8 (k - 3) + 2 q - r, next[k] of one more.
    float at[kSlots + kSlots % 2], next[kSlots + kSlots % 2];
    const uint32_t ones = Ones<T>::diagonal();
    const auto block = [&](int diagonal, int n) -> uint32_t {  // the n-th on it
        const int keys = max_of(0, kKeyBlocks - 1 - diagonal) + n, queries = keys + diagonal - (kKeyBlocks - 1);
        return keys < kKeyBlocks && queries < Strip::kBlocks ? strip.block(keys, queries) : 0;
    };
#pragma unroll
    for (int k = 0; k < kSlots; k += 2) {
        float sums[4] = {};
#pragma unroll
        for (int n = 0; n < kKeyBlocks; n += 2) {
            const uint32_t left[4] = {block(k, n), block(k + 1, n), block(k, n + 1), block(k + 1, n + 1)};
            multiply_blocks<T>(sums, left, ones, ones);
        }
        at[k] = sums[0], next[k] = sums[1], at[k + 1] = sums[2], next[k + 1] = sums[3];
    }
    const int r = lane() / 4;
    // Adds `part` of the lane that is `rows` further, where its distance is the same; lanes wrap around into the next k.
    const auto gather = [&](const float* part, int rows, int columns) {
        // Downwards: at[k - 1] is still what it was.
#pragma unroll
        for (int k = kSlots - 1; k >= 0; --k) {
            const float sent = r < rows ? (k > 0 ? part[k - 1] : 0.0f) : part[k];
            at[k] += __shfl_sync(0xffffffff, sent, (lane() + 4 * rows) % 32 + columns);
        }
    };
    gather(next, 1, 0);
    gather(at, 2, 1);  // lanes with q = 0, 2 get those with q = 1, 3
    gather(at, 4, 2);
    if (lane() % 4 != 0) return;
    const int first = corner - 8 * (kKeyBlocks - 1) - r;
    if (to.exact_position == nullptr && corner - Strip::kKeys >= -reach && corner + kQueries <= reach) {
#pragma unroll
        for (int k = 0; k < kSlots; ++k) atomicAdd(to.position + first + 8 * k, to.scale * at[k]);
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

// The order of the times of a strip's queries.
template <int kQueries>
struct QueryTimes {
    static constexpr int kParts = kQueries / 32;
    static_assert(kQueries == 32 || kQueries == 64);

    QueryOrder<kQueries>& shared;
    int64_t time[kParts];  // of queries lane, lane + 32
    int place[kParts];
    int64_t first, last;
    bool ordered;

    __device__ __forceinline__ explicit QueryTimes(QueryOrder<kQueries>& shared) : shared(shared) {}
    __device__ __forceinline__ void load(const RelativeBias<float>& bias, int row) {
#pragma unroll
        for (int i = 0; i < kParts; ++i)
            time[i] = __ldg(bias.query_times + min_of(row + 32 * i + lane(), bias.len_q - 1)), place[i] = 32 * i + lane();
    }
    __device__ __forceinline__ void find_order() {
        bool rising = true;
        int64_t before = time[0];
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int64_t left = __shfl_sync(0xffffffff, time[i], (lane() + 31) % 32);
            rising = rising && (lane() > 0 ? left : before) <= time[i];
            before = __shfl_sync(0xffffffff, time[i], 31);
        }
        ordered = __all_sync(0xffffffff, rising);
        first = __shfl_sync(0xffffffff, time[0], 0), last = before;
        if (!ordered) sort();
    }
    template <class Time>
    __device__ __forceinline__ void store() const {
#pragma unroll
        for (int i = 0; i < kParts; ++i)
            reinterpret_cast<Time*>(shared.times)[place[i]] =
                static_cast<Time>(sizeof(Time) == 4 ? time[i] - first : time[i]);
    }
    // How many are less than x.
    template <class Time>
    __device__ __forceinline__ int below(Time x) const {
        const Time* const times = reinterpret_cast<const Time*>(shared.times);
        int n = 0;
#pragma unroll
        for (int step = kQueries / 2; step > 0; step /= 2)
            if (times[n + step - 1] < x) n += step;
        return n + (times[n] < x ? 1 : 0);
    }

  private:
    __device__ __forceinline__ void sort() {
        store<int64_t>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kParts; ++i) place[i] = 0;
#pragma unroll 1
        for (int other = 0; other < kQueries; ++other) {
            const int64_t x = shared.times[other];
#pragma unroll
            for (int i = 0; i < kParts; ++i)
                place[i] += x < time[i] || (x == time[i] && other < 32 * i + lane()) ? 1 : 0;
        }
        __syncwarp();
        store<int64_t>();
#pragma unroll
        for (int i = 0; i < kParts; ++i) shared.places[32 * i + lane()] = static_cast<uint8_t>(place[i]);
        __syncwarp();
        first = shared.times[0], last = shared.times[kQueries - 1];
        __syncwarp();
    }
};

// Sums of each key's first 1 to kQueries queries in the order of their times, in shared memory. Rows are shifted against
// one another so that neither writing nor reading the same place of all meets many bank conflicts.
template <int kQueries>
struct SumsInOrder {
    static constexpr int kHalf = 1024;  // floats from 16 keys to the next
    float* at;

    static __device__ __forceinline__ int row(int key) { return key / 16 * kHalf + key % 16 * kQueries; }
    static __device__ __forceinline__ int shift(int key) { return key % 4 * 8 + key / 4 % 4 * 2; }
    // Of this lane's key.
    __device__ __forceinline__ float first(int n) const {
        return n == 0 ? 0.0f : at[row(lane()) + ((n - 1 + shift(lane())) & (kQueries - 1))];
    }

    template <class T>
    __device__ __forceinline__ void write(const GradientStrip<T, kQueries>& strip, const QueryTimes<kQueries>& queries) const {
        const uint32_t triangle = Ones<T>::triangle();
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (!queries.ordered) {
                write_unordered<T>(strip.of[m], 16 * m, queries.shared.places);
                continue;
            }
            float before[4] = {};
#pragma unroll
            for (int step = 0; step < kQueries / 16; ++step) {
                const uint32_t(&left)[4] = strip.of[m].x[step];
                float low[4] = {before[0], before[1], before[2], before[3]};
                float high[4] = {before[0], before[1], before[2], before[3]};
                multiply_blocks<T>(low, left, triangle, 0u);
                multiply_blocks<T>(high, left, Ones<T>::kBoth, triangle);
                multiply_blocks<T>(before, left, Ones<T>::kBoth, Ones<T>::kBoth);
                put(low, 16 * m, 16 * step);
                put(high, 16 * m, 16 * step + 8);
            }
        }
    }

  private:
    __device__ __forceinline__ void put(const float (&x)[4], int key, int place) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int of = key + 8 * half + lane() / 4, col = place + lane() % 4 * 2;
            *reinterpret_cast<float2*>(at + row(of) + ((col + shift(of)) & (kQueries - 1))) =
                float2{x[2 * half], x[2 * half + 1]};
        }
    }
    template <class T>
    __device__ __forceinline__ void write_unordered(const Fragments<kQueries / 16>& left, int key,
                                                    const uint8_t* places) const {
#pragma unroll 1
        for (int from = 0; from < kQueries; from += 8) {
            const int place = from + lane() / 4;
            float sums[4] = {};
#pragma unroll
            for (int step = 0; step < kQueries / 16; ++step) {
                const uint8_t* const of = places + 16 * step + lane() % 4 * 2;
                const auto pair = [&](int i) {
                    return (of[i] <= place ? Ones<T>::kLow : 0) | (of[i + 1] <= place ? Ones<T>::kHigh : 0);
                };
                multiply_blocks<T>(sums, left.x[step], pair(0), pair(8));
            }
            put(sums, key, from);
        }
    }
};

// Of four numbers a lane the sum over the lanes of number lane % 4.
__device__ __forceinline__ float sum_four(const float (&x)[4]) {
    const bool odd = lane() & 1, upper = lane() & 2;
    const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffff, odd ? x[0] : x[1], 1);
    const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(0xffffffff, odd ? x[2] : x[3], 1);
    float sum = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, 2);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}

// A key's time and an edge e: where in the order of the queries |t_i - t_j| reaches e, above and below the key.
template <class Time>
struct TimeLimits;
template <>
struct TimeLimits<int32_t> {  // counted from the first query; differences are at most kReach
    static constexpr uint32_t kReach = 1u << 30;
    int32_t key;

    template <class Queries>
    __device__ __forceinline__ int below(const Queries& queries, uint64_t edge, int) const {
        return queries.template below<int32_t>(key + static_cast<int32_t>(min_of<uint64_t>(edge, kReach + 1)));
    }
    template <class Queries>
    __device__ __forceinline__ int up_to(const Queries& queries, uint64_t edge) const {
        return queries.template below<int32_t>(key - static_cast<int32_t>(min_of<uint64_t>(edge, kReach + 1)) + 1);
    }
};
template <>
struct TimeLimits<int64_t> {
    int64_t key;

    template <class Queries>
    __device__ __forceinline__ int below(const Queries& queries, uint64_t edge, int all) const {
        const uint64_t room = uint64_t{0x7fffffffffffffff} - static_cast<uint64_t>(key);
        const int n = queries.template below<int64_t>(static_cast<int64_t>(static_cast<uint64_t>(key) + edge));
        return edge > room ? all : n;
    }
    template <class Queries>
    __device__ __forceinline__ int up_to(const Queries& queries, uint64_t edge) const {
        const uint64_t room = static_cast<uint64_t>(key) + (uint64_t{1} << 63);
        const int n = queries.template below<int64_t>(static_cast<int64_t>(static_cast<uint64_t>(key) - edge + 1));
        return edge > room ? 0 : n;
    }
};

// Adds the buckets first to last of a strip, four at a time. negative: times of queries before their keys' count.
template <class Time, int kQueries>
__device__ __forceinline__ void add_buckets(TableSums& sums, const SumsInOrder<kQueries>& in_order,
                                            const QueryTimes<kQueries>& queries, TimeLimits<Time> limits, int equal,
                                            bool negative, int first, int last) {
    int below = equal, up_to = equal;  // |t_i - t_j| is less than the edge of the last bucket in [up_to, below)
    float sum_below = in_order.first(equal), sum_up_to = sum_below;
#pragma unroll 1
    for (int group = first & ~3; group <= last; group += 4) {
        int n[4], m[4] = {up_to, up_to, up_to, up_to};
        const auto find = [&](int i) {
            const int b = group + i + 1;
            if (b > last) {
                n[i] = kQueries;
                if (negative) m[i] = 0;
                return;
            }
            const uint64_t edge = __ldg(kAllEdgesOfTime.at + b);
            n[i] = limits.below(queries, edge, kQueries);
            if (negative) m[i] = limits.up_to(queries, edge);
        };
        find(3);
        if (!__any_sync(0xffffffff, n[3] != below || m[3] != up_to)) continue;
#pragma unroll
        for (int i = 0; i < 3; ++i) find(i);
        float of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float next = in_order.first(n[i]);
            of[i] = next - sum_below;
            sum_below = next;
        }
        if (negative) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float next = in_order.first(m[i]);
                of[i] += sum_up_to - next;
                sum_up_to = next;
            }
        }
        below = n[3], up_to = m[3];
        sums.keep(group, 4, sum_four(of));
    }
}

// The first query row that may keep a key, of those from `row` on: 0 for `row`.
template <class Mask>
__device__ __forceinline__ int masked_rows(const Mask& mask, int key, int row) {
    const Spans rows = mask.q_range(key, 1);
    const int first = rows.first.size() > 0 ? rows.first.begin : rows.second.size() > 0 ? rows.second.begin : 0x7fffffff;
    return first - row;
}

// Adds a strip's elements by the buckets of their times. `row`, `col`: its first query and key.
template <class T, int kQueries, class Mask>
__device__ __forceinline__ void add_times(TableSums& sums, const GradientStrip<T, kQueries>& strip,
                                          QueryTimes<kQueries>& queries, int64_t key_time, float* memory,
                                          const Mask& mask, int num_buckets, int row, int col) {
    queries.find_order();
    const uint64_t to_first = time_difference(key_time, queries.first), to_last = time_difference(key_time, queries.last);
    const bool before = key_time < queries.first, between = !before && key_time <= queries.last;
    const uint64_t nearest = between ? 0 : before ? to_first : to_last, farthest = max_of(to_first, to_last);
    const int first = __reduce_min_sync(0xffffffff, min_of(bucket_of(nearest), num_buckets));
    const int last = __reduce_max_sync(0xffffffff, min_of(bucket_of(farthest), num_buckets));
    if (first == last) return sums.add_to_bucket(first, strip.sum());

    const SumsInOrder<kQueries> in_order{memory};
    const bool near = __all_sync(0xffffffff, farthest <= TimeLimits<int32_t>::kReach / 2 &&
                                                 time_difference(queries.first, queries.last) <= TimeLimits<int32_t>::kReach / 2);
    in_order.write(strip, queries);
    const int masked = queries.ordered ? masked_rows(mask, min_of(col + lane(), mask.len_k - 1), row) : 0;
    const auto add = [&](auto limits) {
        using Time = decltype(limits.key);
        queries.template store<Time>();
        __syncwarp();
        const int equal = queries.template below<Time>(limits.key);
        const bool negative = __any_sync(0xffffffff, equal > max_of(0, masked));
        add_buckets<Time, kQueries>(sums, in_order, queries, limits, equal, negative, first, last);
    };
    if (near)
        add(TimeLimits<int32_t>{static_cast<int32_t>(key_time - queries.first)});
    else
        add(TimeLimits<int64_t>{key_time});
}

}  // namespace hstu::attention::sm90
