// The gradient of the time table of the relative bias, as a warp of the SM90 backward adds it up from a strip of G^T.
//
// A lane has one key. Sums along its queries in the order of their times lie in shared memory; a bucket's part of them lies
// between two places in that order, which are found by bisection, and is the difference of two sums, exactly 0 where they
// are one. Times may come in any order and differ by 64 bits.
#pragma once

#include "attention/sm90/relative_gradient.h"

namespace hstu::attention::sm90 {

static __device__ const struct WideTimeEdges {
    uint64_t at[kTimeBuckets];

    constexpr WideTimeEdges() : at{} {
        for (int b = 0; b < kTimeBuckets; ++b) at[b] = kTimeEdges[b];
    }
} kAllEdgesOfTime{};

// By `threads` threads.
__device__ __forceinline__ void fill(TimeTables& tables, int thread, int threads) {
    for (int i = thread; i < 256; i += threads) {
        tables.quarters[i] = kQuartersOfTime.at[i];
        if (i < kTimeBuckets) tables.edges[i] = kAllEdgesOfTime.at[i];
    }
}

// A warp's sums over one work by bucket, in lane b % 32, and that of one bucket which is still spread over the lanes.
struct BucketSums {
    static constexpr int kSlots = ceil_div(kTimeBuckets, 32);
    float at[kSlots] = {};
    int bucket = 0;
    float of_bucket = 0.0f;

    // Buckets from `first` on; lane l has the sum of bucket first + (l - first) % buckets.
    __device__ __forceinline__ void keep(int first, int buckets, float sum) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
            at[slot] += static_cast<uint32_t>(slot * 32 + lane() - first) < static_cast<uint32_t>(buckets) ? sum : 0.0f;
    }
    __device__ __forceinline__ void add(int of, float x) {
        if (of != bucket) {
            keep(bucket, 1, sum_over_lanes(of_bucket));
            bucket = of, of_bucket = 0.0f;
        }
        of_bucket += x;
    }
    __device__ __forceinline__ void flush(const TableGradients& to, int num_buckets) {
        add(-1, 0.0f);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int b = slot * 32 + lane();
            if (b <= num_buckets) to.add(to.time, to.exact_time, b, at[slot]);
        }
    }
};

// The order of the times of a strip's queries.
template <int kQueries>
struct QueryTimes {
    static constexpr int kParts = kQueries / 32;
    static_assert(kQueries == 32 || kQueries == 64);

    QueryOrder<kQueries>& shared;
    int64_t time[kParts], next[kParts];  // of queries lane, lane + 32; what is loaded and not yet taken
    int place[kParts];
    int64_t first, last;
    bool ordered;

    __device__ __forceinline__ explicit QueryTimes(QueryOrder<kQueries>& shared) : shared(shared) {}
    __device__ __forceinline__ void load(const RelativeBias<float>& bias, int row) {
#pragma unroll
        for (int i = 0; i < kParts; ++i)
            next[i] = __ldg(bias.query_times + min_of(row + 32 * i + lane(), bias.len_q - 1));
    }
    // Of what was loaded.
    __device__ __forceinline__ void take() {
#pragma unroll
        for (int i = 0; i < kParts; ++i) time[i] = next[i], place[i] = 32 * i + lane();
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
        for (int i = 0; i < kParts; ++i) {
            const Time x = static_cast<Time>(sizeof(Time) == 4 ? time[i] - first : time[i]);
            reinterpret_cast<Time*>(shared.times)[place[i]] = x;
            if (place[i] % 4 == 3) reinterpret_cast<Time*>(shared.pivots)[place[i] / 4] = x;
        }
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

// The times in their order, to be searched: two reads of shared memory that wait for one another.
template <class Time, int kQueries>
struct SortedTimes {
    struct alignas(4 * sizeof(Time) < 16 ? 4 * sizeof(Time) : 16) Four {
        Time x[4];
    };
    const Four *fours, *pivots;
    Time parts[kQueries / 16 - 1];  // the last of each 16 but the last 16

    __device__ __forceinline__ explicit SortedTimes(const QueryOrder<kQueries>& order)
        : fours(reinterpret_cast<const Four*>(order.times)), pivots(reinterpret_cast<const Four*>(order.pivots)) {
#pragma unroll
        for (int i = 0; i < kQueries / 16 - 1; ++i) parts[i] = fours[4 * i + 3].x[3];
    }
    // How many are less than x.
    __device__ __forceinline__ int below(Time x) const {
        int n = 0;
#pragma unroll
        for (int i = 0; i < kQueries / 16 - 1; ++i) n += parts[i] < x ? 1 : 0;
        const Four pivot = pivots[n];
        n *= 4;
#pragma unroll
        for (int i = 0; i < 3; ++i) n += pivot.x[i] < x ? 1 : 0;
        const Four four = fours[n];
        n *= 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) n += four.x[i] < x ? 1 : 0;
        return n;
    }
};

// Sums of each key's first 1 to kQueries queries in the order of their times, in shared memory. Places are permuted
// from row to row so that neither writing nor reading the same place of all meets many bank conflicts.
template <int kQueries>
struct SumsInOrder {
    float* at;
    int lane = lane_anew();

    static __device__ __forceinline__ int row(int key) { return key * kQueries; }
    static __device__ __forceinline__ int shift(int key) { return key % 4 * 8 + key / 4 % 4 * 2; }
    // Of this lane's key.
    __device__ __forceinline__ float first(int n) const {
        return n == 0 ? 0.0f : at[row(lane) + ((n - 1) ^ shift(lane))];
    }

    template <class T, class Tile>
    __device__ __forceinline__ void write(const GradientStrip<T, Tile, kQueries>& strip,
                                          const QueryTimes<kQueries>& queries) const {
        if (!queries.ordered) return write_unordered(strip, queries.shared.places);
        const uint32_t triangle = Ones<T>::triangle(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float before[4] = {};
#pragma unroll
            for (int step = 0; step < kQueries / 16; ++step) {
                uint32_t left[4];
                strip.load(left, half, step);
                float low[4] = {before[0], before[1], before[2], before[3]};
                float high[4] = {before[0], before[1], before[2], before[3]};
                multiply_blocks<T>(low, left, triangle, 0u);
                multiply_blocks<T>(high, left, Ones<T>::kBoth, triangle);
                multiply_blocks<T>(before, left, Ones<T>::kBoth, Ones<T>::kBoth);
                put(low, 16 * half, 16 * step);
                put(high, 16 * half, 16 * step + 8);
            }
        }
    }

  private:
    __device__ __forceinline__ void put(const float (&x)[4], int key, int place) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int of = key + 8 * half + lane / 4, col = place + lane % 4 * 2;
            *reinterpret_cast<float2*>(at + row(of) + (col ^ shift(of))) = float2{x[2 * half], x[2 * half + 1]};
        }
    }
    template <class T, class Tile>
    __device__ __forceinline__ void write_unordered(const GradientStrip<T, Tile, kQueries>& strip,
                                                    const uint8_t* places) const {
#pragma unroll 1
        for (int from = 0; from < 2 * kQueries; from += 8) {
            const int place = from % kQueries + lane / 4;
            float sums[4] = {};
#pragma unroll
            for (int step = 0; step < kQueries / 16; ++step) {
                const uint8_t* const of = places + 16 * step + lane % 4 * 2;
                const auto pair = [&](int i) {
                    return (of[i] <= place ? Ones<T>::kLow : 0) | (of[i + 1] <= place ? Ones<T>::kHigh : 0);
                };
                uint32_t left[4];
                strip.load(left, from / kQueries, step);
                multiply_blocks<T>(sums, left, pair(0), pair(8));
            }
            put(sums, from / kQueries * 16, from % kQueries);
        }
    }
};

// Of four numbers a lane the sum over the lanes of number (lane - first) % 4.
__device__ __forceinline__ float sum_four(const float (&x)[4], int first) {
    const bool odd = (lane() - first) & 1, upper = (lane() - first) & 2;
    const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffff, odd ? x[0] : x[1], 1);
    const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(0xffffffff, odd ? x[2] : x[3], 1);
    float sum = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, 2);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}

// A key's time and an edge e: how many queries lie below the key's time + e, and up to its time - e.
template <class Time>
struct TimeLimits;
template <>
struct TimeLimits<int32_t> {  // counted from the first query; differences are at most kReach
    static constexpr uint32_t kReach = 1u << 30;
    int32_t key;

    template <class Queries>
    __device__ __forceinline__ int below(const Queries& queries, uint64_t edge, int) const {
        return queries.below(key + static_cast<int32_t>(min_of<uint64_t>(edge, kReach + 1)));
    }
    template <class Queries>
    __device__ __forceinline__ int up_to(const Queries& queries, uint64_t edge) const {
        return queries.below(key - static_cast<int32_t>(min_of<uint64_t>(edge, kReach + 1)) + 1);
    }
};
template <>
struct TimeLimits<int64_t> {
    int64_t key;

    template <class Queries>
    __device__ __forceinline__ int below(const Queries& queries, uint64_t edge, int all) const {
        const uint64_t room = uint64_t{0x7fffffffffffffff} - static_cast<uint64_t>(key);
        const int n = queries.below(static_cast<int64_t>(static_cast<uint64_t>(key) + edge));
        return edge > room ? all : n;
    }
    template <class Queries>
    __device__ __forceinline__ int up_to(const Queries& queries, uint64_t edge) const {
        const uint64_t room = static_cast<uint64_t>(key) + (uint64_t{1} << 63);
        const int n = queries.below(static_cast<int64_t>(static_cast<uint64_t>(key) - edge + 1));
        return edge > room ? 0 : n;
    }
};

// Adds the buckets first to last of a strip, four at a time, of which those that hold nothing are passed over.
// kNegative: times of queries before their keys' count.
template <bool kNegative, class Time, int kQueries>
__device__ __forceinline__ void add_buckets(BucketSums& sums, const SumsInOrder<kQueries>& in_order,
                                            const SortedTimes<Time, kQueries>& queries, TimeLimits<Time> limits,
                                            const uint64_t* edges, int equal, int first, int last) {
    struct Place {
        int below, up_to;  // |t_i - t_j| is less than an edge in [up_to, below)
    };
    const auto find = [&](int bucket) -> Place {  // of the edge above it
        const bool none = bucket >= last;
        const uint64_t edge = edges[none ? last : bucket + 1];
        const int below = limits.below(queries, edge, kQueries);
        if constexpr (!kNegative) return {none ? kQueries : below, equal};
        const int up_to = limits.up_to(queries, edge);
        return {none ? kQueries : below, none ? 0 : up_to};
    };
    Place before{equal, equal}, end = find(first + 3);
    float sum_below = in_order.first(equal), sum_up_to = sum_below;
#pragma unroll 1
    for (int group = first; group <= last; group += 4) {
        Place after;
        if (__any_sync(0xffffffff, end.below != before.below || end.up_to != before.up_to)) {
            const Place places[4] = {find(group), find(group + 1), find(group + 2), end};
            after = find(group + 7);
            float of[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float next = in_order.first(places[i].below);
                of[i] = next - sum_below;
                sum_below = next;
            }
            if constexpr (kNegative) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float next = in_order.first(places[i].up_to);
                    of[i] += sum_up_to - next;
                    sum_up_to = next;
                }
            }
            sums.keep(group, 4, sum_four(of, group));
        } else {
            after = find(group + 7);
        }
        before = end, end = after;
    }
}

// The first query row that may keep a key, of those from `row` on: 0 for `row`.
template <class Mask>
__device__ __forceinline__ int masked_rows(const Mask& mask, int key, int row) {
    const Spans rows = mask.q_range(key, 1);
    const int first = rows.first.size() > 0    ? rows.first.begin
                      : rows.second.size() > 0 ? rows.second.begin
                                               : 0x7fffffff;
    return first - row;
}

// The sums of a strip by the buckets of its times.
template <int kQueries>
struct TimeSums {
    const TimeTables& tables;
    const QueryTimes<kQueries>& queries;
    float* scratch;  // of the strip
    int64_t key_time;

    // start() reads the strip, finish() does not.
    int first = 0, last = 0;  // buckets
    bool near = false;

    __device__ __forceinline__ void find_buckets(int num_buckets) {
        constexpr uint64_t kNear = TimeLimits<int32_t>::kReach / 2;
        const uint64_t to_first = time_difference(key_time, queries.first);
        const uint64_t to_last = time_difference(key_time, queries.last), farthest = max_of(to_first, to_last);
        const bool before = key_time<queries.first, behind = key_time> queries.last;
        const uint64_t nearest = before ? to_first : behind ? to_last : 0;
        first = __reduce_min_sync(0xffffffff, min_of(bucket(nearest), num_buckets));
        last = __reduce_max_sync(0xffffffff, min_of(bucket(farthest), num_buckets));
        near = __all_sync(0xffffffff, farthest <= kNear && time_difference(queries.first, queries.last) <= kNear);
    }
    template <class T, class Tile>
    __device__ __forceinline__ void start(BucketSums& sums, const GradientStrip<T, Tile, kQueries>& strip) const {
        if (first == last)
            sums.add(first, strip.sum());
        else
            SumsInOrder<kQueries>{scratch}.write(strip, queries);
    }
    // masked: so many of the first queries do not count.
    __device__ __forceinline__ void finish(BucketSums& sums, int masked) const {
        if (first == last) return;
        if (near)
            add(sums, TimeLimits<int32_t>{static_cast<int32_t>(key_time - queries.first)}, masked);
        else
            add(sums, TimeLimits<int64_t>{key_time}, masked);
    }

  private:
    template <class Time>
    __device__ __forceinline__ void add(BucketSums& sums, TimeLimits<Time> limits, int masked) const {
        const SumsInOrder<kQueries> in_order{scratch};
        __syncwarp();
        queries.template store<Time>();
        __syncwarp();
        const SortedTimes<Time, kQueries> sorted(queries.shared);
        const int equal = sorted.below(limits.key);
        if (__any_sync(0xffffffff, equal > max_of(0, masked)))
            add_buckets<true>(sums, in_order, sorted, limits, tables.edges, equal, first, last);
        else
            add_buckets<false>(sums, in_order, sorted, limits, tables.edges, equal, first, last);
    }
    __device__ __forceinline__ int bucket(uint64_t x) const {
        const TimeQuarter quarter = tables.quarters[quarter_of(__ull2float_rz(x))];
        return quarter.bucket + (x >= quarter.edge() ? 1 : 0);
    }
};

}  // namespace hstu::attention::sm90
