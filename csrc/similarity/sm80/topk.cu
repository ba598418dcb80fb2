#include "similarity/sm80/topk.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/cuda_launch.h"
#include "similarity/sm80/topk_scan.h"
#include "similarity/sm90/topk_scan.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kKeys = 16, kNarrowThreads = 128, kWideThreads = 512;  // keys of a thread of a selection

// A family's products (topk_scan.h) with the warps' mma.
template <class T, int kBlockRows, int kWarpsM>
struct WarpProducts {
    using Grid = WarpGrid<kBlockRows, kTileItems, kWarpsM, kWarps / kWarpsM>;
    static constexpr int kRows = kBlockRows, kRowCount = Grid::kM * 2, kCount = Grid::kN * 2;
    typename Grid::Acc acc;

    static __device__ __forceinline__ int row() { return Grid::row() + lane() / 4; }
    static __device__ __forceinline__ int col() { return Grid::col() + lane() % 4 * 2; }
    static __device__ __forceinline__ void landed() {}
    __device__ __forceinline__ void clear() { acc.clear(); }
    template <class Panel, class ItemPanel>
    __device__ __forceinline__ void add(Panel query, ItemPanel items) {
        matmul<T, 4>(acc, LeftRows<Panel>(query, Grid::row()), RightRows<ItemPanel>(items, Grid::col()));
    }
    __device__ __forceinline__ float score(int r, int i) const { return acc.x[r / 2][i / 2][r % 2 * 2 + i % 2]; }
};

// The same for scores that are there already: a warp takes kAhead x 32 columns of a row with one addition to its count.
__global__ void __launch_bounds__(kThreads)
    topk_offer_kernel(const __grid_constant__ TopkScan p, const __grid_constant__ TopkScores tile) {
    constexpr int kAhead = 8;
    const int64_t row = blockIdx.x, step = int64_t{gridDim.y} * kThreads * kAhead;
    const float* const scores = static_cast<const float*>(tile.scores.data) + row * tile.scores.stride;
    const uint64_t threshold = p.thresholds[row];
    const float least = least_score(threshold);
    for (int64_t col0 = (int64_t{blockIdx.y} * kThreads + warp() * 32) * kAhead; col0 < tile.cols; col0 += step) {
        uint32_t found[kAhead];
        float score[kAhead];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t col = col0 + i * 32 + lane();
            score[i] = col < tile.cols ? scores[col] : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const bool beats =
                score[i] >= least && candidate(p, tile.col0 + col0 + i * 32 + lane(), score[i], threshold);
            found[i] = __ballot_sync(0xffffffffu, beats);
            count += __popc(found[i]);
        }
        if (count == 0) continue;
        int slot = 0;
        if (lane() == 0) slot = atomicAdd(p.counts + row, count);
        slot = __shfl_sync(0xffffffffu, slot, 0);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (found[i] >> lane() & 1)
                append(p, row, slot + __popc(found[i] & ((1u << lane()) - 1)),
                       key_of(score[i], tile.col0 + col0 + i * 32 + lane()));
            slot += __popc(found[i]);
        }
    }
}

// ---- Selection ----

// Sorts keys[0, size) in shared memory, the largest first. size is a power of two. Exchanges over at most 32 stay within
// the 64 keys of a warp, so that only the longer ones need the block's barrier.
template <int kSorters>
__device__ __forceinline__ void sort_descending(uint64_t* keys, int size) {
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += kSorters) {
                const int low = (i & ~(distance - 1)) * 2 + (i & (distance - 1)), high = low + distance;
                const uint64_t a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
            }
            if (distance > 32 || (distance == 1 && run >= 64))
                __syncthreads();
            else
                __syncwarp();
        }
    }
    __syncthreads();
}

// A thread's keys of `count`: every kBlock-th.
template <int kBlock>
__device__ __forceinline__ void read_keys(const uint64_t* from, int count, uint64_t (&mine)[kKeys]) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) mine[i] = i * kBlock + threadIdx.x < count ? from[i * kBlock + threadIdx.x] : 0;
}

// The k-th best of the block's keys, which are distinct or 0; not above any key where there are fewer than k. It is found
// bit by bit: a bit is 1 if at least k keys are not below what that gives. It lies between the threshold and the best key,
// whose leading bits it shares with both.
template <int kBlock>
__device__ __forceinline__ uint64_t kth_key(const uint64_t (&mine)[kKeys], int count, int k, uint64_t threshold) {
    __shared__ int totals[3];
    __shared__ uint32_t top;
    if (threadIdx.x == 0) totals[0] = 0, top = 0;
    __syncthreads();
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) best = max_of(best, static_cast<uint32_t>(mine[i] >> 32));
    best = __reduce_max_sync(0xffffffffu, best);
    if (lane() == 0) atomicMax(&top, best);
    __syncthreads();
    best = top;

    const auto not_below = [&](const auto& is_not_below) {
        constexpr int kChunk = 4;
        int found = 0;
#pragma unroll
        for (int begin = 0; begin < kKeys; begin += kChunk) {
            if (begin * kBlock >= count) break;
#pragma unroll
            for (int i = begin; i < begin + kChunk; ++i) found += is_not_below(mine[i]) ? 1 : 0;
        }
        return __reduce_add_sync(0xffffffffu, found);
    };
    const uint32_t differing = best ^ static_cast<uint32_t>(threshold >> 32);
    const int first_bit = differing == 0 ? 31 : 63 - __clz(differing);
    uint64_t last = uint64_t{best} << 32 & ~((uint64_t{2} << first_bit) - 1);
    int total = -1;
    for (int bit = first_bit, step = 0; bit >= 0 && total != k; --bit, ++step) {
        const uint64_t trial = last | uint64_t{1} << bit;
        const uint32_t score = static_cast<uint32_t>(trial >> 32);
        const int found = bit >= 32 ? not_below([&](uint64_t key) { return static_cast<uint32_t>(key >> 32) >= score; })
                                    : not_below([&](uint64_t key) { return key >= trial; });
        if (threadIdx.x == 0) totals[(step + 1) % 3] = 0;
        if (lane() == 0 && found > 0) atomicAdd(totals + step % 3, found);
        __syncthreads();
        total = totals[step % 3];
        if (total >= k) last = trial;
    }
    __syncthreads();  // before the next use of totals
    return last;
}

// Writes the keys that are not below `last`, in any order; returns how many there are.
template <int kBlock>
__device__ __forceinline__ int write_keys(const uint64_t (&mine)[kKeys], uint64_t last, uint64_t* to) {
    __shared__ int written;
    if (threadIdx.x == 0) written = 0;
    __syncthreads();
    int found = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) found += mine[i] >= last ? 1 : 0;
    int slot = found;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, slot, step);
        if (lane() >= step) slot += before;
    }
    int base = 0;
    if (lane() == 31) base = atomicAdd(&written, slot);
    slot += __shfl_sync(0xffffffffu, base, 31) - found;
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
        if (mine[i] >= last) to[slot++] = mine[i];
    __syncthreads();
    return written;
}

// Keeps the best k of keys[0, count) in shared memory, in any order; returns how many are left and sets the threshold.
__device__ __forceinline__ int select(uint64_t* keys, int count, int k, uint64_t& threshold) {
    if (count < k) return count;
    uint64_t mine[kKeys];
    read_keys<kWideThreads>(keys, count, mine);
    const uint64_t last = kth_key<kWideThreads>(mine, count, k, threshold);
    if (last > 0) threshold = last;
    return write_keys<kWideThreads>(mine, max_of<uint64_t>(last, 1), keys);  // 0: excluded
}

// One block a row, for rows of few candidates, in registers. Of excluded items only those are looked up that would be
// kept.
__global__ void __launch_bounds__(kNarrowThreads) topk_narrow_kernel(const __grid_constant__ TopkScan p) {
    const int64_t row = blockIdx.x;
    const int offered = p.counts[row], kept = p.kept[row];
    if (offered == kept || offered > kKeys * kNarrowThreads) return;
    uint64_t* const stored = p.keys + row * p.capacity;
    const uint64_t threshold = p.thresholds[row];
    uint64_t mine[kKeys], last = 0;
    read_keys<kNarrowThreads>(stored, offered, mine);
    bool found_excluded = true;
    while (found_excluded) {
        last = kth_key<kNarrowThreads>(mine, offered, p.k, threshold);
        found_excluded = false;
        if (p.excluded) {
#pragma unroll
            for (int i = 0; i < kKeys; ++i) {
                if (i * kNarrowThreads + threadIdx.x < kept || mine[i] < max_of<uint64_t>(last, 1)) continue;
                if (is_excluded(p, row, item_of(mine[i]))) mine[i] = 0, found_excluded = true;
            }
            found_excluded = __syncthreads_or(found_excluded);
        }
    }
    const int left = write_keys<kNarrowThreads>(mine, max_of<uint64_t>(last, 1), stored);
    if (threadIdx.x > 0) return;
    if (last > 0) p.thresholds[row] = last;
    p.counts[row] = p.kept[row] = left;
}

// The result: the kept keys of a row, sorted.
__global__ void __launch_bounds__(kThreads) topk_write_kernel(const __grid_constant__ TopkScan p) {
    __shared__ uint64_t keys[kTopkMaxK];
    const int64_t row = blockIdx.x;
    const int left = p.counts[row];
    int size = 2;
    while (size < left) size *= 2;
    for (int i = threadIdx.x; i < size; i += kThreads) keys[i] = i < left ? p.keys[row * p.capacity + i] : 0;
    sort_descending<kThreads>(keys, size);
    for (int i = threadIdx.x; i < p.k; i += kThreads) {
        const uint64_t key = i < left ? keys[i] : 0;  // 0: nothing
        p.values[row * p.k + i] = key ? score_of(key) : -INFINITY;
        p.indices[row * p.k + i] = key ? item_of(key) : -1;
    }
}

// Scores of a row with the items of a round, in groups of at most kTileItems: a warp an item.
template <class T>
struct DotProducts {
    Round round;
    int64_t most() const { return round.is_first ? (round.end - round.begin) * kTileItems : INT64_MAX; }
    __device__ __forceinline__ int64_t groups() const { return round.end - round.begin; }
    __device__ __forceinline__ int64_t first(int64_t group, const TopkScan&) const {
        return round[round.begin + group] * kTileItems;
    }
    __device__ __forceinline__ int64_t end(const TopkScan& p) const { return p.items; }
    __device__ __forceinline__ float score(const TopkScan& p, int64_t row, int64_t item) const {
        const T* const query = static_cast<const T*>(p.query.data) + row * p.query.stride;
        const T* const other = static_cast<const T*>(p.catalogue.data) + item * p.catalogue.stride;
        float sum = 0.0f;
        for (int64_t d = lane(); d < p.dim; d += 32) sum += static_cast<float>(query[d]) * static_cast<float>(other[d]);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        return sum;
    }
};

struct TileScores {
    TopkScores tile;
    int64_t most() const { return tile.col0 == 0 ? tile.cols : INT64_MAX; }
    __device__ __forceinline__ int64_t groups() const { return ceil_div<int64_t>(tile.cols, kTileItems); }
    __device__ __forceinline__ int64_t first(int64_t group, const TopkScan&) const {
        return tile.col0 + group * kTileItems;
    }
    __device__ __forceinline__ int64_t end(const TopkScan&) const { return tile.col0 + tile.cols; }
    __device__ __forceinline__ float score(const TopkScan&, int64_t row, int64_t item) const {
        return static_cast<const float*>(tile.scores.data)[row * tile.scores.stride + item - tile.col0];
    }
};

// A round whose candidates did not fit, once more from the kept keys [0, kept), selecting whenever the room is full.
template <class Scores>
__device__ __forceinline__ int rescan(const TopkScan& p, const Scores& scores, int64_t row, uint64_t* keys, int kept,
                                      uint64_t& threshold) {
    __shared__ int count;
    if (threadIdx.x == 0) count = kept;
    __syncthreads();
    for (int64_t group = 0; group < scores.groups(); ++group) {
        const int64_t first = scores.first(group, p), end = min_of(first + kTileItems, scores.end(p));
        for (int64_t item = first + warp(); item < end; item += kWideThreads / 32) {
            const float score = scores.score(p, row, item);
            const uint64_t key = lane() == 0 ? candidate(p, item, score, threshold) : 0;
            if (key != 0 && !is_excluded(p, row, item)) keys[atomicAdd(&count, 1)] = key;
        }
        __syncthreads();
        const int now = count;
        __syncthreads();
        if (now > p.capacity - kTileItems) {
            const int left = select(keys, now, p.k, threshold);
            if (threadIdx.x == 0) count = left;
            __syncthreads();
        }
    }
    __syncthreads();
    return count;
}

// One block a row, for what is too much for a warp.
template <class Scores>
__global__ void __launch_bounds__(kWideThreads)
    topk_select_kernel(const __grid_constant__ TopkScan p, const __grid_constant__ Scores scores) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    uint64_t* const keys = reinterpret_cast<uint64_t*>(shared_memory);  // [capacity]
    const int64_t row = blockIdx.x;
    const int offered = p.counts[row], kept = p.kept[row];
    if (offered == kept) return;

    uint64_t* const stored = p.keys + row * p.capacity;
    uint64_t threshold = p.thresholds[row];
    int count = offered > p.capacity ? kept : offered;
    for (int i = threadIdx.x; i < count; i += kWideThreads)
        keys[i] = i >= kept && is_excluded(p, row, item_of(stored[i])) ? 0 : stored[i];
    __syncthreads();
    if (offered > p.capacity) count = rescan(p, scores, row, keys, kept, threshold);
    const int left = select(keys, count, p.k, threshold);
    for (int i = threadIdx.x; i < left; i += kWideThreads) stored[i] = keys[i];
    if (threadIdx.x == 0) {
        p.thresholds[row] = threshold;
        p.counts[row] = p.kept[row] = left;
    }
}

void clear(const TopkScan& p, cudaStream_t stream) {
    const auto *const begin = reinterpret_cast<const char*>(p.thresholds), *end = reinterpret_cast<const char*>(p.keys);
    check_cuda(cudaMemsetAsync(p.thresholds, 0, static_cast<size_t>(end - begin), stream), "clearing memory");
}

template <class Scores>
void launch_select(const TopkScan& p, const Scores& scores, bool last, cudaStream_t stream) {
    constexpr int64_t kNarrow = kKeys * kNarrowThreads;
    const int64_t most = scores.most();  // of the candidates of a row, where that is known; then one kernel is enough
    if (most <= kNarrow || most == INT64_MAX)
        launch<topk_narrow_kernel>(p.rows, kNarrowThreads, 0, p.device, stream, p);
    const int shared_bytes = p.capacity * static_cast<int>(sizeof(uint64_t));
    if (most > kNarrow)
        launch<topk_select_kernel<Scores>>(p.rows, kWideThreads, shared_bytes, p.device, stream, p, scores);
    if (last) launch<topk_write_kernel>(p.rows, kThreads, 0, p.device, stream, p);
}

template <class T>
void scan(const TopkScan& p, cudaStream_t stream) {
    const int64_t tiles = ceil_div<int64_t>(p.items, kTileItems);
    int64_t stride = max_of<int64_t>(1, static_cast<int64_t>(0.618 * static_cast<double>(tiles)));
    while (std::gcd(stride, tiles) != 1) ++stride;
    const bool wide = topk_scan_rows(p) == 128;
    for (int64_t done = 0; done < tiles;) {
        const int64_t length = topk_round(p.items, done * kTileItems, p.k, p.rows) / kTileItems;
        const bool is_dense = 2 * int64_t{p.k} > done;  // a warp of 32 x 64 scores expects more than 8 then
        const Round round{done, min_of(tiles, done + length), tiles, stride, done == 0, is_dense};
        if (!wide) scan_round<T, WarpProducts<T, 32, 1>>(p, round, stream);
#if HSTU_EXT_SM90
        else if (sm90::runs_topk_scan(p.device))
            sm90::topk_scan_round<T>(p, round, stream);
#endif
        else
            scan_round<T, WarpProducts<T, 128, 4>>(p, round, stream);
        launch_select(p, DotProducts<T>{round}, round.end == tiles, stream);
        done = round.end;
    }
}

}  // namespace

int64_t topk_round(int64_t items, int64_t done, int64_t k, int64_t rows) {
    constexpr int kNarrow = kKeys * kNarrowThreads, kFewRows = 64;
    const int64_t first = clamp_to<int64_t>(9 * k / 2 / kTileItems * kTileItems, kNarrow, topk_capacity(k));
    if (done == 0) return first;
    const double count = static_cast<double>(k), deviation = 1 / std::sqrt(count);
    const double fits = (static_cast<double>(topk_capacity(k)) - count) / (1 + 5 * deviation);
    const bool is_narrow = rows <= kFewRows && k <= kNarrow / 4;
    const double wanted = is_narrow ? (kNarrow - count) / (1 + 2 * deviation) : std::max(500.0, 5 * count / 2);
    const double growth = 1 + std::min(fits, wanted) / count;
    const double all = static_cast<double>(items) / static_cast<double>(first);
    const double rounds = std::max(1.0, std::ceil(std::log(all) / std::log(growth)));
    const auto length = static_cast<int64_t>(static_cast<double>(done) * (std::pow(all, 1 / rounds) - 1));
    return max_of<int64_t>(1, ceil_div<int64_t>(length, kTileItems)) * kTileItems;
}

int topk_scan_rows(const TopkScan& p) {
    const auto aligned = [](const Matrix& x) {
        return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
    };
    if (p.dim % 8 != 0 || !aligned(p.query) || !aligned(p.catalogue) || p.dim > (1 << 20)) return 0;
    const int panels = static_cast<int>(ceil_div<int64_t>(p.dim, 64)), limit = max_shared_bytes(p.device);
    if (p.rows > 32 && ScanShared<bf16, 128>::bytes(panels) <= limit) return 128;
    return ScanShared<bf16, 32>::bytes(panels) <= limit ? 32 : 0;
}

void topk_scan(const TopkScan& p, DType dtype, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    clear(p, stream);
    if (dtype == DType::kBFloat16)
        scan<bf16>(p, stream);
    else
        scan<fp16>(p, stream);
}

void topk_merge(const TopkScan& p, const TopkScores& tile, bool last, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    if (tile.col0 == 0) clear(p, stream);
    const int64_t wanted = ceil_div<int64_t>(8 * multiprocessors(p.device), p.rows);
    for (int64_t done = 0; done < tile.cols;) {
        const int64_t cols = min_of(tile.cols - done, topk_round(p.items, tile.col0 + done, p.k, p.rows));
        const Matrix scores{static_cast<float*>(tile.scores.data) + done, tile.scores.stride};
        const TopkScores part{scores, tile.col0 + done, cols};
        const int64_t blocks = clamp_to<int64_t>(ceil_div<int64_t>(cols, 4 * kThreads), 1, max_of<int64_t>(1, wanted));
        launch_grid<topk_offer_kernel>(dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(blocks)), kThreads, 0,
                                       p.device, stream, p, part);
        done += cols;
        launch_select(p, TileScores{part}, last && done == tile.cols, stream);
    }
}

}  // namespace hstu::similarity::sm80
