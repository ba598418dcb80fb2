// The scan of topk_dot: scores of a tile of queries with one tile of items after the other, and what beats the thresholds.
// The products are a family's: Products has
//   kRows, kRowCount, kCount   queries of a block; a thread's rows, every eighth, and its scores of each
//   clear(), add(query panel, items panel)   of a tile; the panels may be overwritten after the block's next barrier
//   landed()                   before the barrier that publishes what this thread has copied
//   row(), col()               of the thread's first score
//   score(r, i)                of row row() + 8 r and column(col(), i)
#pragma once

#include <cmath>

#include "attention/sm80/tile.h"
#include "common/cuda_launch.h"
#include "similarity/sm80/topk.h"

namespace hstu::similarity::sm80 {

using namespace hstu::attention::sm80;  // tiles and their loads

constexpr int kTileItems = kTopkTileItems, kThreads = 256, kWarps = kThreads / 32;
constexpr int kListed = 12;  // candidates that a warp of the scan keeps until the next tile

// ---- Candidates ----

__device__ __forceinline__ uint64_t key_of(float score, int64_t item) {
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(item));
}

__device__ __forceinline__ float score_of(uint64_t key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ int64_t item_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Scores below this one cannot beat the threshold.
__device__ __forceinline__ float least_score(uint64_t threshold) { return threshold ? score_of(threshold) : -INFINITY; }

__device__ __forceinline__ bool is_excluded(const TopkScan& p, int64_t row, int64_t item) {
    if (!p.excluded) return false;
    int64_t low = clamp_to<int64_t>(p.excluded_offsets[row], 0, p.excluded_count);
    int64_t high = clamp_to<int64_t>(p.excluded_offsets[row + 1], low, p.excluded_count);
    const int64_t end = high;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.excluded[middle] < item)
            low = middle + 1;
        else
            high = middle;
    }
    return low < end && p.excluded[low] == item;
}

// The key of an item that beats the threshold, else 0. NaN beats nothing.
__device__ __forceinline__ uint64_t candidate(const TopkScan& p, int64_t item, float score, uint64_t threshold) {
    if (!(score > -INFINITY) || item >= p.items || (p.valid && !p.valid[item])) return 0;
    const uint64_t key = key_of(score, item);
    return key > threshold ? key : 0;
}

__device__ __forceinline__ void append(const TopkScan& p, int64_t row, int slot, uint64_t key) {
    if (slot < p.capacity) p.keys[row * p.capacity + slot] = key;
}

// ---- Scanning: scores of a tile of queries with one tile of items after the other ----

// The tiles of a round, in an order that spreads neighbours over all rounds: catalogues are often sorted.
struct Round {
    int64_t begin, end;     // positions [begin, end) of all tiles
    int64_t tiles, stride;  // have no factor in common
    bool is_first;          // there is no threshold: every item is a candidate, in the slot of its place in the round
    bool is_dense;          // nearly more candidates than a list takes are expected of a tile

    HSTU_HOST_DEVICE int64_t operator[](int64_t position) const { return position * stride % tiles; }
};

// Candidates on their way from the warps of a scan to their rows, where a slot must be asked for. The answer takes as
// long as a tenth of a tile's products, so it is asked for before the products of the next tile and used after them.
template <int kStages>
struct Lists {
    int64_t first_items[kStages];  // of the tile in a stage of the ring
    uint64_t keys[kWarps][kListed];
    uint8_t rows[kWarps][kListed];
};

template <class T, int kRows>
struct ScanShared {
    static constexpr int kStages = kRows == 128 ? 3 : 5;
    using Panel = Tile<kRows, 64>;  // 64 columns of the queries
    using ItemPanel = Tile<kTileItems, 64>;

    uint32_t base;
    int panels;
    __host__ __device__ static int lists(int panels) { return panels * Panel::kBytes + kStages * ItemPanel::kBytes; }
    __host__ __device__ static int bytes(int panels) {
        return lists(panels) + static_cast<int>(sizeof(Lists<kStages>));
    }
    __device__ Panel query(int panel) const { return {base + panel * Panel::kBytes}; }
    __device__ ItemPanel items(int stage) const { return {base + panels * Panel::kBytes + stage * ItemPanel::kBytes}; }
};

// What follows is rare, and small so that it does not push the products out of the instruction cache. A lane has scores
// of one row: score i is that of column col0 + i / 2 * 8 + i % 2 of the tile, and bit i of `found` says that it is not
// below the threshold's.
__device__ __forceinline__ int column(int col0, int i) { return col0 + i / 2 * 8 + i % 2; }

// Whether a score that is not below `least`, the threshold's, is a candidate. The threshold is read for equal ones alone.
__device__ __forceinline__ bool qualifies(const TopkScan& p, int64_t row, int64_t item, float score, float least) {
    if (item >= p.items || (p.valid && !p.valid[item])) return false;
    return score > least || candidate(p, item, score, p.thresholds[row]) != 0;
}

// Appends what the thread found in its rows, every eighth from `row` on. The four lanes of a row make one addition to its
// count, and the additions of all rows are under way at once.
template <int kRowCount, int kCount>
__device__ __noinline__ void append_rows(const TopkScan& p, int64_t row, int64_t item0, int col0,
                                         const float (&scores)[kRowCount][kCount], const uint32_t (&found)[kRowCount],
                                         const float (&least)[kRowCount]) {
    uint32_t beaten[kRowCount];
    int slot[kRowCount];
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
        beaten[r] = 0;
        for (uint32_t rest = found[r]; rest; rest &= rest - 1) {
            const int i = __ffs(rest) - 1;
            if (qualifies(p, row + r * 8, item0 + column(col0, i), scores[r][i], least[r])) beaten[r] |= 1u << i;
        }
        __syncwarp();
        const int count = __popc(beaten[r]), neighbour = __shfl_xor_sync(0xffffffffu, count, 1);
        const int pair = count + neighbour, other_pair = __shfl_xor_sync(0xffffffffu, pair, 2);
        slot[r] = (lane() & 1 ? neighbour : 0) + (lane() & 2 ? other_pair : 0);
        if (lane() % 4 == 0 && pair + other_pair > 0) slot[r] = atomicAdd(p.counts + row + r * 8, pair + other_pair);
    }
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
        const int first = __shfl_sync(0xffffffffu, slot[r], lane() & ~3);
        int to = first + (lane() % 4 == 0 ? 0 : slot[r]);
        for (; beaten[r]; beaten[r] &= beaten[r] - 1) {
            const int i = __ffs(beaten[r]) - 1;
            append(p, row + r * 8, to++, key_of(scores[r][i], item0 + column(col0, i)));
        }
    }
}

// The keys of all items of a tile, one beside the other from `slot0` on; 0 for those that can be no candidates.
template <int kRowCount, int kCount>
__device__ __noinline__ void place_rows(const TopkScan& p, int64_t row, int64_t item0, int slot0, int col0,
                                        const float (&scores)[kRowCount][kCount], const float (&least)[kRowCount]) {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
        if (least[r] > 0) continue;  // outside
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            const int64_t col = column(col0, i);
            const ulonglong2 keys{candidate(p, item0 + col, scores[r][i], 0),
                                  candidate(p, item0 + col + 1, scores[r][i + 1], 0)};
            *reinterpret_cast<ulonglong2*>(p.keys + (row + r * 8) * p.capacity + slot0 + col) = keys;
        }
    }
}

// Puts what the warp found in its rows on its list, from `listed` on; what does not fit is appended at once. Returns how
// many there are then.
inline __device__ __noinline__ int list_row(const TopkScan& p, uint64_t* keys, uint8_t* rows, int64_t row0, int row,
                                            int64_t item0, int col0, const float* scores, uint32_t found, float least,
                                            int listed) {
    while (__any_sync(0xffffffffu, found != 0)) {
        const int i = max_of(__ffs(found) - 1, 0);
        const int64_t item = item0 + column(col0, i);
        const bool is_candidate = found != 0 && qualifies(p, row0 + row, item, scores[i], least);
        const uint32_t candidates = __ballot_sync(0xffffffffu, is_candidate);
        if (is_candidate) {
            const int slot = listed + __popc(candidates & ((1u << lane()) - 1));
            const uint64_t key = key_of(scores[i], item);
            if (slot < kListed)
                keys[slot] = key, rows[slot] = static_cast<uint8_t>(row);
            else
                append(p, row0 + row, atomicAdd(p.counts + row0 + row, 1), key);
        }
        listed += __popc(candidates);
        found &= found - 1;
    }
    return listed;
}

// One block: kRows queries, which stay in shared memory, and every gridDim.y-th tile of the round. Panels of 64 columns
// of the items come through a ring of kStages; one barrier a panel publishes the one that has landed and frees the one
// to be refilled. Scores are fp32 accumulators; a row is looked at element by element only where its best one qualifies.
template <class T, class Products>
__global__ void __launch_bounds__(kThreads, 2)
    topk_scan_kernel(const __grid_constant__ TopkScan p, const __grid_constant__ Round round) {
    constexpr int kRows = Products::kRows, kRowCount = Products::kRowCount, kCount = Products::kCount;
    using Shared = ScanShared<T, kRows>;
    constexpr int kStages = Shared::kStages;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const int dim = static_cast<int>(p.dim), panels = ceil_div(dim, 64);
    const Shared shared{static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)), panels};

    const int64_t row0 = int64_t{blockIdx.x} * kRows;
    const int rows = static_cast<int>(min_of<int64_t>(kRows, p.rows - row0));
    const T* const query = static_cast<const T*>(p.query.data) + row0 * p.query.stride;
    const T* const catalogue = static_cast<const T*>(p.catalogue.data);
    for (int panel = 0; panel < panels; ++panel)
        load_tile<kThreads>(shared.query(panel), query + panel * 64, p.query.stride, rows, dim - panel * 64);

    // What is loaded next: panel `next_panel` of the tile at `next`.
    int64_t next = round.begin + blockIdx.y, next_tile = round[next];
    const int64_t tile_step = round[gridDim.y];
    int next_panel = 0, next_stage = 0;
    auto& lists = *reinterpret_cast<Lists<kStages>*>(shared_memory + Shared::lists(panels));
    uint64_t* const keys = lists.keys[warp()];
    uint8_t* const key_rows = lists.rows[warp()];
    const auto load_next = [&] {
        if (next < round.end) {
            const int64_t item0 = next_tile * kTileItems;
            if (threadIdx.x == 0) lists.first_items[next_stage] = item0;
            load_tile<kThreads>(shared.items(next_stage), catalogue + item0 * p.catalogue.stride + next_panel * 64,
                                p.catalogue.stride, static_cast<int>(min_of<int64_t>(kTileItems, p.items - item0)),
                                dim - next_panel * 64);
            if (++next_panel == panels) {
                next_panel = 0, next += gridDim.y, next_tile += tile_step;
                if (next_tile >= round.tiles) next_tile -= round.tiles;
            }
            next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
        }
        cute::cp_async_fence();
    };
    for (int i = 0; i < kStages - 1; ++i) load_next();

    float least[kRowCount];
#pragma unroll
    for (int i = 0; i < kRowCount; ++i) {
        const int row = Products::row() + i * 8;
        least[i] = row < rows ? least_score(p.thresholds[row0 + row]) : INFINITY;
    }

    int stage = 0, listed = 0;
    for (int64_t position = round.begin + blockIdx.y; position < round.end; position += gridDim.y) {
        const bool has_key = lane() < listed;
        int slot = 0;
        if (has_key) slot = atomicAdd(p.counts + row0 + key_rows[lane()], 1);
        Products scores;
        scores.clear();
        int64_t item0 = 0;
        for (int panel = 0; panel < panels; ++panel) {
            cute::cp_async_wait<kStages - 2>();
            Products::landed();
            __syncthreads();
            load_next();
            if (panel == 0) item0 = lists.first_items[stage];
            scores.add(shared.query(panel), shared.items(stage));
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        if (has_key) append(p, row0 + key_rows[lane()], slot, keys[lane()]);
        __syncwarp();
        listed = 0;

        const int col0 = Products::col(), row = Products::row();
        uint32_t found[kRowCount], any = 0;
#pragma unroll
        for (int r = 0; r < kRowCount; ++r) {
            found[r] = 0;
#pragma unroll
            for (int i = 0; i < kCount; ++i) found[r] |= scores.score(r, i) >= least[r] ? 1u << i : 0;
            any |= found[r];
        }
        if (!round.is_first && !__any_sync(0xffffffffu, any != 0)) continue;
        if (round.is_first || round.is_dense) {
            float copy[kRowCount][kCount];
#pragma unroll
            for (int r = 0; r < kRowCount; ++r) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) copy[r][i] = scores.score(r, i);
            }
            if (round.is_first)
                place_rows(p, row0 + row, item0, static_cast<int>(position) * kTileItems, col0, copy, least);
            else
                append_rows(p, row0 + row, item0, col0, copy, found, least);
            continue;
        }
#pragma unroll
        for (int r = 0; r < kRowCount; ++r) {
            if (!__any_sync(0xffffffffu, found[r] != 0)) continue;
            float copy[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) copy[i] = scores.score(r, i);
            listed = list_row(p, keys, key_rows, row0, row + r * 8, item0, col0, copy, found[r], least[r], listed);
        }
        listed = min_of(listed, kListed);
        __syncwarp();
    }
    if (lane() < listed) {
        const int64_t to = row0 + key_rows[lane()];
        append(p, to, atomicAdd(p.counts + to, 1), keys[lane()]);
    }
    if (round.is_first && blockIdx.y == 0 && threadIdx.x < rows)
        p.counts[row0 + threadIdx.x] = static_cast<int>(round.end - round.begin) * kTileItems;
}

template <class T, class Products>
void scan_round(const TopkScan& p, const Round& round, cudaStream_t stream) {
    constexpr int kRows = Products::kRows;
    const int64_t row_tiles = ceil_div<int64_t>(p.rows, kRows);
    const int64_t blocks = 2 * multiprocessors(p.device);
    const int64_t splits = clamp_to<int64_t>(blocks / row_tiles, 1, round.end - round.begin);
    const int shared_bytes = ScanShared<T, kRows>::bytes(static_cast<int>(ceil_div<int64_t>(p.dim, 64)));
    launch_grid<topk_scan_kernel<T, Products>>(dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(splits)),
                                               kThreads, shared_bytes, p.device, stream, p, round);
}

}  // namespace hstu::similarity::sm80
