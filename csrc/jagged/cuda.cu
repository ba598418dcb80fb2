// The jagged copies on a GPU: one kernel for all of them, over the maps of row_map.h.
#include "common/cuda_launch.h"
#include "jagged/row_map.h"

static_assert(CUDART_VERSION >= 12010, "256 parts are more than 4 KB of kernel parameters, which need nvcc 12.1");

namespace hstu::jagged::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // loads of a thread that are under way together
constexpr int kTilesOfMultiprocessor = 96;
constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
__device__ T* shuffled(T* pointer, int lane) {
    return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Up to 32 rows, `units` in all. Lane r has the pointers of row r; the unit that a thread moves may be of any of them.
// Every row has a source: loads that are not under a predicate are all issued before the first one is waited for.
template <class Unit>
__device__ void copy_units(const Tiling& tiling, int units, const char* from, char* to) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < units; first += 32 * kUnroll) {
        Unit values[kUnroll];
        Unit* targets[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            const int i = min_of(first + 32 * k + lane, units - 1);
            const int row = tiling.row_of_unit(i), column = i - row * tiling.columns;
            values[k] =
                __ldcs(reinterpret_cast<const Unit*>(shuffled(from, row)) + column);  // read once: not to be kept
            targets[k] = reinterpret_cast<Unit*>(shuffled(to, row)) + column;
        }
#pragma unroll
        for (int k = 0; k < kUnroll; ++k)
            if (first + 32 * k + lane < units) *targets[k] = values[k];
    }
}

// Unit `column` of a row that is filled with a pattern of 8 bytes.
template <class Unit>
__device__ Unit filled(uint64_t pattern, int column) {
    const uint2 both{static_cast<unsigned>(pattern), static_cast<unsigned>(pattern >> 32)};
    if constexpr (sizeof(Unit) == 16)
        return {both.x, both.y, both.x, both.y};
    else if constexpr (sizeof(Unit) == 8)
        return both;
    else
        return static_cast<Unit>(pattern >> (column * sizeof(Unit) % 8 * 8));
}

// The same where some rows have no source, and become the pattern.
template <class Unit>
__device__ void copy_or_fill_units(const Tiling& tiling, int units, const char* from, char* to, uint64_t pattern) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < units; first += 32) {
        const int i = first + lane, row = tiling.row_of_unit(i), column = i - row * tiling.columns;
        const Unit* const source = reinterpret_cast<const Unit*>(shuffled(from, row));
        Unit* const target = reinterpret_cast<Unit*>(shuffled(to, row));
        if (i < units) target[column] = source ? __ldcs(source + column) : filled<Unit>(pattern, column);
    }
}

template <class Unit>
__device__ void write_units(const Tiling& tiling, int units, const char* from, char* to, uint64_t pattern) {
    if (__all_sync(kAllLanes, from != nullptr))
        copy_units<Unit>(tiling, units, from, to);
    else
        copy_or_fill_units<Unit>(tiling, units, from, to, pattern);
}

__device__ void write_rows(const Tiling& tiling, int units, const char* from, char* to, uint64_t pattern) {
    switch (tiling.unit) {
        case 16: return write_units<uint4>(tiling, units, from, to, pattern);
        case 8: return write_units<uint2>(tiling, units, from, to, pattern);
        case 4: return write_units<unsigned>(tiling, units, from, to, pattern);
        case 2: return write_units<unsigned short>(tiling, units, from, to, pattern);
        default: return write_units<unsigned char>(tiling, units, from, to, pattern);
    }
}

template <class Map>
__device__ int64_t search_by_warp(const Map& map, const Tile& tile) {
    WarpSearch search{0, map.boundaries()};
    while (!search.is_done()) {
        const int64_t probe = search.probe(threadIdx.x % 32);
        const bool not_beyond = probe < search.high && map.at(tile, probe) <= tile.first_row;
        search.narrow(__popc(__ballot_sync(kAllLanes, not_beyond)));
    }
    return search.low;
}

// out[row] = source row of the map, or the pattern where the map has none.
//
// Each warp copies one tile of the output, by itself: no shared memory, nobody waits on anybody. Tiles are consecutive
// rows, 2 to 16 KB in 16-byte units, so raggedness costs no balance. The warp finds the sequence of its first row by a
// search in steps of 33: some 1 KB of offsets, which the warps beside it want too, and two dependent misses where one
// thread's bisection would have ten. Then, 32 rows at a time, lane r
//   1. finds the sequence of row r from the one found before it, mostly at the first look;
//   2. asks the map for the row it is a copy of;
// and all lanes together move the units of the 32 rows, consecutive lanes consecutive units, four loads each before the
// first store: 2 KB a warp are under way, 64 KB a multiprocessor.
// Where the map is that of a join of a few parts, the threads of the grid also share out the sums of the offsets.
template <class Map>
__global__ void __launch_bounds__(kThreads, 4) hstu_jagged_copy(const __grid_constant__ Map map) {
    const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (index >= map.tiling.count) return;
    const int lane = threadIdx.x % 32;
    const Tile tile = map.tile(index);
    if (tile.rows > 0) {
        const auto boundary = [&](int64_t i) { return map.at(tile, i); };
        int64_t beyond = search_by_warp(map, tile);
        for (int first = 0; first < tile.rows; first += 32) {
            const int rows = min_of(tile.rows - first, 32);
            const int64_t row = tile.first_row + first + min_of(lane, rows - 1);
            beyond = first_beyond(boundary, beyond, map.boundaries(), row);
            const char* const from = map.from(tile, beyond - 1, row);
            write_rows(map.tiling, rows * tile.columns, from ? from + tile.first_byte : nullptr,
                       map.to(tile, row) + tile.first_byte, map.fill);
            beyond = __shfl_sync(kAllLanes, beyond, 31);
        }
    }
    if constexpr (Map::kWritesOffsets) map.write_offsets(index * 32 + lane, map.tiling.count * 32);
}

// joined_offsets[b] = the sum of the parts' offsets of sequence b; a thread has one b.
template <class Map>
__global__ void __launch_bounds__(kThreads) hstu_jagged_offsets(const __grid_constant__ Map map) {
    map.write_offsets(int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

// The largest unit that every row begins at a multiple of and is a multiple of.
class Alignment {
  public:
    explicit Alignment(int64_t row_bytes) { add(row_bytes); }
    void add(int64_t bytes) { bits_ |= static_cast<uint64_t>(bytes); }
    void add(const char* data) { bits_ |= reinterpret_cast<uintptr_t>(data); }
    void add(const Rows& rows) {
        if (rows.count > 0) add(rows.data);
        if (rows.count > 1) add(rows.stride);
    }
    int unit() const { return static_cast<int>(bits_ & (~bits_ + 1)); }

  private:
    uint64_t bits_ = 16;
};

struct Queue {
    int device;
    cudaStream_t stream;

    int64_t warps() const { return int64_t{multiprocessors(device)} * kTilesOfMultiprocessor; }

    template <class Map>
    void copy(const Map& map) const {
        launch<hstu_jagged_copy<Map>>(ceil_div<int64_t>(map.tiling.count, kWarps), kThreads, 0, device, stream, map);
    }
};

// Up to kFewParts: one launch, of small parameters. More: the offsets' sum would be dear to compute at every look, so a
// launch of its own writes it.
template <int kCapacity, class Offset>
void join_parts(const JoinParams& p, const Tiling& tiling, const Queue& queue) {
    if (p.split) return queue.copy(SplitMap<kCapacity, Offset>(p, tiling));
    using Map = JoinMap<kCapacity, Offset>;
    const Map map(p, tiling);
    if constexpr (!Map::kWritesOffsets)
        launch<hstu_jagged_offsets<Map>>(ceil_div<int64_t>(p.batch + 1, kThreads), kThreads, 0, queue.device,
                                         queue.stream, map);
    queue.copy(map);
}

template <class Offset>
void join_as(const JoinParams& p, const Tiling& tiling, const Queue& queue) {
    p.part_count <= kFewParts ? join_parts<kFewParts, Offset>(p, tiling, queue)
                              : join_parts<kMaxParts, Offset>(p, tiling, queue);
}

template <class Offset>
void dense_as(const DenseParams& p, const Tiling& tiling, const Queue& queue) {
    p.to_jagged ? queue.copy(ToJaggedMap<Offset>(p, tiling)) : queue.copy(ToDenseMap<Offset>(p, tiling));
}

}  // namespace

void join(const JoinParams& p, int device, void* stream) {
    const DeviceGuard guard(device);
    const Queue queue{device, static_cast<cudaStream_t>(stream)};
    Alignment alignment(p.row_bytes);
    alignment.add(p.joined);
    int64_t rows = p.split ? 0 : p.joined.count;
    for (int i = 0; i < p.part_count; ++i) {
        alignment.add(p.parts[i].rows);
        if (p.split) rows += p.parts[i].rows.count;
    }
    const Tiling tiling(alignment.unit(), p.row_bytes, rows, queue.warps());
    p.offsets_are_int64 ? join_as<int64_t>(p, tiling, queue) : join_as<int32_t>(p, tiling, queue);
}

void dense(const DenseParams& p, int device, void* stream) {
    const DeviceGuard guard(device);
    const Queue queue{device, static_cast<cudaStream_t>(stream)};
    const int64_t dense_rows = p.batch * p.max_len;
    Alignment alignment(p.row_bytes);
    alignment.add(p.jagged);
    alignment.add({p.dense, dense_rows, p.dense_stride});
    alignment.add({p.dense, dense_rows, p.batch_stride});
    const Tiling tiling(alignment.unit(), p.row_bytes, p.to_jagged ? p.jagged.count : dense_rows, queue.warps());
    p.offsets.is_int64 ? dense_as<int64_t>(p, tiling, queue) : dense_as<int32_t>(p, tiling, queue);
}

}  // namespace hstu::jagged::cuda
