// The in-batch softmax with its matrix products (mma.sync + cp.async), on queries q_i and items e_j:
//
//     l_ij = cos(q_i, e_j) / temperature - log_q[j], over the positive and every item that is kept as a negative
//     forward: maximum and sum of exponentials of every row
//     backward: G_ij = dloss_i / temperature (exp(l_ij - lse_i) - [j = positive])
//     gradient of unit queries G e, of unit items G^T q
//
// One block: kRows rows of one side, which stay in shared memory, and a share of the other side in tiles of kCols rows,
// which come through a two-stage ring. The first barrier of a step publishes the tile that has landed and frees the other
// stage. Backward a second one publishes G, which passes through shared memory in half precision on its way to the second
// product; the tile that was the right operand of the scores is the right operand of that one, too.
#include "similarity/sm80/in_batch_fused.h"

#include <cmath>

#include "attention/sm80/tile.h"
#include "common/cuda_launch.h"

namespace hstu::similarity::sm80 {
namespace {

using namespace hstu::attention::sm80;  // tiles and warp-level products

constexpr int kRows = 128, kCols = 64, kWarps = 8, kThreads = kWarps * 32;

template <int kDim>
struct FusedShared {
    using RowTile = Tile<kRows, kDim>;
    using ColTile = Tile<kCols, kDim>;
    using ScoreTile = Tile<kRows, kCols>;
    static constexpr int kRing = RowTile::kBytes, kScores = kRing + 2 * ColTile::kBytes;
    static constexpr int kRecords = kScores + ScoreTile::kBytes, kBytes = kRecords + 2 * kCols * 24;

    uint32_t base;
    __device__ RowTile rows() const { return {base}; }
    __device__ ColTile cols(int stage) const { return {base + kRing + stage * ColTile::kBytes}; }
    __device__ ScoreTile scores() const { return {base + kScores}; }
};

using ScoreGrid = WarpGrid<kRows, kCols, 4, 2>;

// A query outside of all has no positive and no weight; an item outside of all has a logit of -inf.
__device__ __forceinline__ QueryRecord query_record(const InBatchFused& p, int64_t t) {
    return t < p.queries ? p.query_records[t] : QueryRecord{-1, -1, -1, 0.0f};
}
__device__ __forceinline__ ItemRecord item_record(const InBatchFused& p, int64_t j) {
    return j < p.items ? p.item_records[j] : ItemRecord{-2, -2, INFINITY, 0.0f};
}

// What a query's weights are made of: G_ij = scale (exp(l_ij - lse) - [j = positive]).
struct Weight {
    float lse, scale;
};
__device__ __forceinline__ Weight weight_of(const InBatchFused& p, int64_t t) {
    return t < p.queries ? Weight{p.lse[t], p.dloss[t] * p.inv_temperature} : Weight{INFINITY, 0.0f};
}

// This block's tiles of the other side.
struct Share {
    int begin, end;
    __device__ __forceinline__ Share(int64_t others, int splits) {
        const int tiles = static_cast<int>(ceil_div<int64_t>(others, kCols)), step = ceil_div(tiles, splits);
        begin = min_of(tiles, static_cast<int>(blockIdx.y) * step);
        end = min_of(tiles, begin + step);
    }
};

template <class T, int kDim>
__device__ __forceinline__ void load_rows(Tile<kRows, kDim> to, const Matrix& from, int64_t first, int64_t count,
                                          int64_t dim) {
    load_tile<kThreads>(to, static_cast<const T*>(from.data) + first * from.stride, from.stride,
                        static_cast<int>(min_of<int64_t>(kRows, count - first)), static_cast<int>(dim));
}

template <class T, int kDim>
__device__ __forceinline__ void load_cols(Tile<kCols, kDim> to, const Matrix& from, int64_t first, int64_t count,
                                          int64_t dim) {
    load_tile<kThreads>(to, static_cast<const T*>(from.data) + first * from.stride, from.stride,
                        static_cast<int>(min_of<int64_t>(kCols, count - first)), static_cast<int>(dim));
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) in_batch_forward_kernel(const __grid_constant__ InBatchFused p) {
    using Shared = FusedShared<kDim>;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const Shared shared{static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))};
    ItemRecord* const records = reinterpret_cast<ItemRecord*>(shared_memory + Shared::kRecords);  // [2][kCols]
    const int64_t row0 = int64_t{blockIdx.x} * kRows;
    const Share share(p.items, p.splits);

    QueryRecord query[ScoreGrid::kM * 2];
    float maximum[ScoreGrid::kM * 2], sum[ScoreGrid::kM * 2];
#pragma unroll
    for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
        query[i] = query_record(p, row0 + ScoreGrid::row() + i * 8 + lane() / 4);
        maximum[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    const auto load = [&](int tile) {
        load_cols<T, kDim>(shared.cols(tile & 1), p.item, int64_t{tile} * kCols, p.items, p.dim);
        if (threadIdx.x < kCols)
            records[(tile & 1) * kCols + threadIdx.x] = item_record(p, int64_t{tile} * kCols + threadIdx.x);
    };
    load_rows<T, kDim>(shared.rows(), p.query, row0, p.queries, p.dim);
    if (share.begin < share.end) load(share.begin);
    cute::cp_async_fence();

    for (int tile = share.begin; tile < share.end; ++tile) {
        cute::cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < share.end) load(tile + 1);
        cute::cp_async_fence();
        typename ScoreGrid::Acc scores;
        scores.clear();
        matmul<T, kDim / 16>(scores, LeftRows<typename Shared::RowTile>(shared.rows(), ScoreGrid::row()),
                             RightRows<typename Shared::ColTile>(shared.cols(tile & 1), ScoreGrid::col()));
        const int col0 = ScoreGrid::col() + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < ScoreGrid::kN; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int col = col0 + n * 8 + c, j = tile * kCols + col;
                const ItemRecord item = records[(tile & 1) * kCols + col];
#pragma unroll
                for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
                    float& x = scores.x[i / 2][n][i % 2 * 2 + c];
                    const bool is_positive = j == query[i].positive;
                    x = x * item.inverse * query[i].scale - item.log_q;
                    if (is_positive) p.positive_logit[row0 + ScoreGrid::row() + i * 8 + lane() / 4] = x;
                    if (!is_positive && is_masked(query[i], item)) x = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
            float top = maximum[i];
#pragma unroll
            for (int n = 0; n < ScoreGrid::kN; ++n)
                top = fmaxf(top, fmaxf(scores.x[i / 2][n][i % 2 * 2], scores.x[i / 2][n][i % 2 * 2 + 1]));
            const float shift = top == -INFINITY ? 0.0f : top;
            sum[i] *= __expf(maximum[i] - shift);
            maximum[i] = top;
#pragma unroll
            for (int n = 0; n < ScoreGrid::kN; ++n)
                sum[i] +=
                    __expf(scores.x[i / 2][n][i % 2 * 2] - shift) + __expf(scores.x[i / 2][n][i % 2 * 2 + 1] - shift);
        }
    }

    // The four lanes of a row, then the two warps that share it.
    const auto merge = [](float& maximum, float& sum, float other_maximum, float other_sum) {
        const float top = fmaxf(maximum, other_maximum), shift = top == -INFINITY ? 0.0f : top;
        sum = sum * expf(maximum - shift) + other_sum * expf(other_maximum - shift);
        maximum = top;
    };
    cute::cp_async_wait<0>();
    __syncthreads();
    float2* const halves = reinterpret_cast<float2*>(shared_memory);  // [kRows]
#pragma unroll
    for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const float other_maximum = __shfl_xor_sync(0xffffffffu, maximum[i], step);
            const float other_sum = __shfl_xor_sync(0xffffffffu, sum[i], step);
            merge(maximum[i], sum[i], other_maximum, other_sum);
        }
        if (warp() % 2 == 1 && lane() % 4 == 0)
            halves[ScoreGrid::row() + i * 8 + lane() / 4] = make_float2(maximum[i], sum[i]);
    }
    __syncthreads();
    if (warp() % 2 == 1 || lane() % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
        const int row = ScoreGrid::row() + i * 8 + lane() / 4;
        if (row0 + row >= p.queries) continue;
        merge(maximum[i], sum[i], halves[row].x, halves[row].y);
        p.maximum[blockIdx.y * p.queries + row0 + row] = maximum[i];
        p.sum[blockIdx.y * p.queries + row0 + row] = sum[i];
    }
}

// One thread: one query, whose shares it puts together.
__global__ void __launch_bounds__(kThreads) in_batch_finish_kernel(const __grid_constant__ InBatchFused p) {
    const int64_t t = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (t >= p.queries) return;
    float top = -INFINITY, total = 0.0f;
    for (int split = 0; split < p.splits; ++split) top = fmaxf(top, p.maximum[split * p.queries + t]);
    const float shift = top == -INFINITY ? 0.0f : top;
    for (int split = 0; split < p.splits; ++split)
        total += p.sum[split * p.queries + t] * expf(p.maximum[split * p.queries + t] - shift);
    p.lse[t] = top + logf(total);
    p.loss[t] = p.lse[t] - p.positive_logit[t];
}

__device__ __forceinline__ void add_pair(float* to, float a, float b) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
#else
    atomicAdd(to, a);
    atomicAdd(to + 1, b);
#endif
}

// kOfItems: the rows of the block are items and the tiles of the other side are queries.
template <class T, int kDim, bool kOfItems>
__global__ void __launch_bounds__(kThreads, 1) in_batch_backward_kernel(const __grid_constant__ InBatchFused p) {
    using Shared = FusedShared<kDim>;
    using OutGrid = WarpGrid<kRows, kDim, 4, 2>;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const Shared shared{static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))};
    QueryRecord* const queries = reinterpret_cast<QueryRecord*>(shared_memory + Shared::kRecords);  // [2][kCols], or
    ItemRecord* const items = reinterpret_cast<ItemRecord*>(shared_memory + Shared::kRecords);      // the same of items
    Weight* const weights = reinterpret_cast<Weight*>(shared_memory + Shared::kRecords + 2 * kCols * 16);  // [2][kCols]
    const int64_t row0 = int64_t{blockIdx.x} * kRows;
    const int64_t row_count = kOfItems ? p.items : p.queries, col_count = kOfItems ? p.queries : p.items;
    const Matrix& row_matrix = kOfItems ? p.item : p.query;
    const Matrix& col_matrix = kOfItems ? p.query : p.item;
    const Share share(col_count, p.splits);

    using RowRecord = std::conditional_t<kOfItems, ItemRecord, QueryRecord>;
    RowRecord row_records[ScoreGrid::kM * 2];
    Weight row_weights[ScoreGrid::kM * 2];
#pragma unroll
    for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
        const int64_t row = row0 + ScoreGrid::row() + i * 8 + lane() / 4;
        if constexpr (kOfItems) {
            row_records[i] = item_record(p, row);
        } else {
            row_records[i] = query_record(p, row);
            row_weights[i] = weight_of(p, row);
        }
    }
    const auto load = [&](int tile) {
        const int64_t first = int64_t{tile} * kCols;
        const int place = (tile & 1) * kCols + threadIdx.x;
        load_cols<T, kDim>(shared.cols(tile & 1), col_matrix, first, col_count, p.dim);
        if (threadIdx.x >= kCols) return;
        if constexpr (kOfItems) {
            queries[place] = query_record(p, first + threadIdx.x);
            weights[place] = weight_of(p, first + threadIdx.x);
        } else {
            items[place] = item_record(p, first + threadIdx.x);
        }
    };
    load_rows<T, kDim>(shared.rows(), row_matrix, row0, row_count, p.dim);
    if (share.begin < share.end) load(share.begin);
    cute::cp_async_fence();

    typename OutGrid::Acc out;
    out.clear();
    for (int tile = share.begin; tile < share.end; ++tile) {
        cute::cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < share.end) load(tile + 1);
        cute::cp_async_fence();
        {
            typename ScoreGrid::Acc scores;
            scores.clear();
            matmul<T, kDim / 16>(scores, LeftRows<typename Shared::RowTile>(shared.rows(), ScoreGrid::row()),
                                 RightRows<typename Shared::ColTile>(shared.cols(tile & 1), ScoreGrid::col()));
            const int col0 = ScoreGrid::col() + lane() % 4 * 2;
#pragma unroll
            for (int n = 0; n < ScoreGrid::kN; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int col = col0 + n * 8 + c, place = (tile & 1) * kCols + col;
                    std::conditional_t<kOfItems, QueryRecord, ItemRecord> other;
                    Weight col_weight{};
                    if constexpr (kOfItems)
                        other = queries[place], col_weight = weights[place];
                    else
                        other = items[place];
#pragma unroll
                    for (int i = 0; i < ScoreGrid::kM * 2; ++i) {
                        const int row = static_cast<int>(row0) + ScoreGrid::row() + i * 8 + lane() / 4;
                        const auto pair = [&](const QueryRecord& query, const ItemRecord& item, int j,
                                              const Weight& of_query) {
                            float& x = scores.x[i / 2][n][i % 2 * 2 + c];
                            const bool is_positive = j == query.positive;
                            float weight = __expf(x * p.inv_temperature - item.log_q - of_query.lse);
                            if (is_positive)
                                weight -= 1.0f;
                            else if (is_masked(query, item))
                                weight = 0.0f;
                            x = weight * of_query.scale;
                        };
                        if constexpr (kOfItems)
                            pair(other, row_records[i], row, col_weight);
                        else
                            pair(row_records[i], other, tile * kCols + col, row_weights[i]);
                    }
                }
            }
            ScoreGrid::template store<T>(scores, shared.scores());
        }
        __syncthreads();
        matmul<T, kCols / 16>(out, LeftRows<typename Shared::ScoreTile>(shared.scores(), OutGrid::row()),
                              RightColumns<typename Shared::ColTile>(shared.cols(tile & 1), OutGrid::col()));
    }
    cute::cp_async_wait<0>();

    const int dim = static_cast<int>(p.dim);
#pragma unroll
    for (int m = 0; m < OutGrid::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + OutGrid::row() + m * 16 + half * 8 + lane() / 4;
            if (row >= row_count) continue;
#pragma unroll
            for (int n = 0; n < OutGrid::kN; ++n) {
                const int col = OutGrid::col() + n * 8 + lane() % 4 * 2;
                if (col < dim)
                    add_pair(p.gradient + row * p.dim + col, out.x[m][n][half * 2], out.x[m][n][half * 2 + 1]);
            }
        }
    }
}

// Calls run<T, kDim>() for a dtype and the bucket of a dimension.
template <class Run>
void dispatch(DType dtype, int64_t dim, const Run& run) {
    const auto with_dim = [&](auto element) {
        if (dim <= 64) return run(element, std::integral_constant<int, 64>{});
        if (dim <= 128) return run(element, std::integral_constant<int, 128>{});
        return run(element, std::integral_constant<int, 256>{});
    };
    if (dtype == DType::kBFloat16)
        with_dim(bf16{});
    else
        with_dim(fp16{});
}

dim3 grid_of(int64_t rows, int splits) {
    return dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kRows)), static_cast<unsigned>(splits));
}

}  // namespace

int in_batch_splits(int64_t rows, int64_t others, int64_t dim, int device) {
    const int bytes = dim <= 64    ? FusedShared<64>::kBytes
                      : dim <= 128 ? FusedShared<128>::kBytes
                                   : FusedShared<256>::kBytes;
    if (dim > 256 || dim % 8 != 0 || bytes > max_shared_bytes(device)) return 0;
    const int64_t row_tiles = ceil_div<int64_t>(rows, kRows),
                  most = min_of<int64_t>(32, ceil_div<int64_t>(others, 8 * kCols));
    const int64_t room = multiprocessors(device);
    int best = 1;
    double best_share = 0;
    for (int64_t splits = 1; splits <= max_of<int64_t>(1, most); ++splits) {
        const int64_t blocks = row_tiles * splits, rounds = ceil_div(blocks, room);
        const double share = static_cast<double>(blocks) / static_cast<double>(rounds * room);
        if (share > best_share + 0.03) best = static_cast<int>(splits), best_share = share;
    }
    return best;
}

void in_batch_fused_forward(const InBatchFused& p, DType dtype, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    dispatch(dtype, p.dim, [&](auto element, auto dim) {
        constexpr int kDim = decltype(dim)::value;
        launch_grid<in_batch_forward_kernel<decltype(element), kDim>>(grid_of(p.queries, p.splits), kThreads,
                                                                      FusedShared<kDim>::kBytes, p.device, stream, p);
    });
    launch<in_batch_finish_kernel>(ceil_div<int64_t>(p.queries, kThreads), kThreads, 0, p.device, stream, p);
}

void in_batch_fused_backward(const InBatchFused& p, DType dtype, bool of_items, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    dispatch(dtype, p.dim, [&](auto element, auto dim) {
        using T = decltype(element);
        constexpr int kDim = decltype(dim)::value, kBytes = FusedShared<kDim>::kBytes;
        if (of_items)
            launch_grid<in_batch_backward_kernel<T, kDim, true>>(grid_of(p.items, p.splits), kThreads, kBytes, p.device,
                                                                 stream, p);
        else
            launch_grid<in_batch_backward_kernel<T, kDim, false>>(grid_of(p.queries, p.splits), kThreads, kBytes,
                                                                  p.device, stream, p);
    });
}

}  // namespace hstu::similarity::sm80
