// The sampled softmax loss on a GPU. With unit rows u_j of the items of query t, and q its own unit row:
//
//   l_j = q . u_j / temperature - log_q[j], -5e4 for a negative with the positive's id;   p = softmax(l)
//   loss = -log p_0;   w_j = (p_j - [j = 0]) / temperature, 0 for a masked one, is its gradient by the similarity
//   dquery = J_query(sum_j w_j u_j),   J_x(g) = (g - u (u . g)) / max(|x|, eps) with u = x / max(|x|, eps)
//   dtable[v] = J_table[v](sum of dloss_t w_tj q_t over the pairs (t, j) of item v)
//
// The forward reads every row of the table once, and while it has it in registers adds it to what becomes dquery, under
// a running maximum; that leaves the backward one product with dloss. The backward sorts the pairs by item
// (sampled_sort.cu), cuts them into chunks and adds up each in its order; no sum depends on how the work was scheduled.
#include "similarity/sm80/sampled_softmax.h"

#include "common/cuda_launch.h"
#include "similarity/sm80/rows.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kPanelVectors = 64;
constexpr float kMaskedLogit = -5e4f;

struct Scale {
    float inverse_temperature, inverse_eps;

    explicit Scale(const SampledParams& p)
        : inverse_temperature(static_cast<float>(p.inv_temperature)), inverse_eps(static_cast<float>(1 / p.eps)) {}
};

__device__ __forceinline__ int64_t warp_index() { return blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; }

__device__ __forceinline__ float log_q_of(const SampledParams& p, int item) {
    return p.log_q ? static_cast<const float*>(p.log_q)[item] : 0.0f;
}

// The softmax of what has gone by: all sums are of exp(logit - maximum). The positive is not in `sum`, so that its
// weight p_0 - 1 = -sum / (sum + exp(positive - maximum)) is not a difference of nearly equal numbers.
struct Softmax {
    float positive, maximum, sum = 0;

    __device__ __forceinline__ explicit Softmax(float positive_logit)
        : positive(positive_logit), maximum(positive_logit) {}
    __device__ __forceinline__ float total() const { return sum + expf(positive - maximum); }
};

// 32 negatives, one a lane. A lane past the last one has the positive's item, which is masked.
struct Batch {
    int item;
    float log_q;
    unsigned masked;  // a bit for every lane

    __device__ __forceinline__ Batch(const SampledParams& p, int64_t t, int64_t j, int positive) {
        item = j < p.samples ? p.inside(p.negative[t * p.samples + j]) : positive;
        log_q = log_q_of(p, item);
        masked = __ballot_sync(kAllLanes, item == positive);
    }
};

// The loss of query t, and its gradient by the similarities from the negatives' logits that lie in its place, -inf for
// masked ones. Called by a warp that has the same softmax in all lanes; scale is 1 / (temperature max(|query t|, eps)).
__device__ __forceinline__ void finish_row(const SampledForwardParams& p, int64_t t, int lane, const Softmax& softmax,
                                           float scale) {
    float* const to = p.dsimilarity + t * (p.samples + 1);
    const float total = softmax.total(), factor = scale / total;
    __syncwarp();  // other lanes wrote the logits
    for (int64_t j = lane; j < p.samples; j += 32) to[j + 1] = expf(to[j + 1] - softmax.maximum) * factor;
    if (lane > 0) return;
    to[0] = -softmax.sum * factor;
    static_cast<float*>(p.loss)[t] = softmax.maximum - softmax.positive + logf(total);
}

// One warp: one query, which every group of kLanes lanes holds in registers. Each group takes every (32 / kLanes)-th
// negative, reads its row once for the product, the norm and the weighted sum, and keeps a softmax of its own; at the
// end the groups' are put together. Items and log_q come 32 at a time, a lane each. No warp waits for another.
template <class T, int kWidth, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads) sampled_forward_kernel(const SampledForwardParams p, Scale scale) {
    using Group = RowGroup<T, kWidth, kLanes, kVectors>;
    constexpr int kGroups = 32 / kLanes, kElements = Group::kElements;
    const int64_t t = warp_index();
    if (t >= p.rows) return;
    const int lane = threadIdx.x % 32, group_index = lane / kLanes;
    const Group group{static_cast<int>(p.dim), lane % kLanes};
    float* const logits = p.dsimilarity + t * (p.samples + 1) + 1;

    typename Group::Row query, row, sum;
    group.load(row_of<const T>(p.query, t), query);
    const Norm query_norm(group.sum(dot(query, query)), scale.inverse_eps);
    const int positive = p.inside(p.positive[t]);
    group.load(row_of<const T>(p.table, positive), row);
    const Norm positive_norm(group.sum(dot(row, row)), scale.inverse_eps);
    Softmax softmax(group.sum(dot(query, row)) * query_norm.inverse * positive_norm.inverse *
                        scale.inverse_temperature -
                    log_q_of(p, positive));
#pragma unroll
    for (float& value : sum) value = 0;

    for (int64_t j0 = 0; j0 < p.samples; j0 += 32) {
        const Batch batch(p, t, j0 + lane, positive);
        const int count = static_cast<int>(min_of<int64_t>(32, p.samples - j0));
        for (int i0 = 0; i0 < count; i0 += kGroups) {
            const int i = i0 + group_index;
            group.load(row_of<const T>(p.table, __shfl_sync(kAllLanes, batch.item, i)), row);
            const float log_q = __shfl_sync(kAllLanes, batch.log_q, i);
            const float product = group.sum(dot(query, row)), square = group.sum(dot(row, row));
            if (i >= count) continue;
            const Norm norm(square, scale.inverse_eps);
            const bool masked = batch.masked >> i & 1;
            float logit = product * query_norm.inverse * norm.inverse * scale.inverse_temperature - log_q;
            if (group.lane == 0) logits[j0 + i] = masked ? -INFINITY : logit;
            if (masked) logit = kMaskedLogit;
            if (logit > softmax.maximum) {
                const float shrink = expf(softmax.maximum - logit);
                softmax.sum *= shrink;
#pragma unroll
                for (float& value : sum) value *= shrink;
                softmax.maximum = logit;
            }
            const float weight = expf(logit - softmax.maximum), coefficient = masked ? 0.0f : weight * norm.inverse;
            softmax.sum += weight;
#pragma unroll
            for (int d = 0; d < kElements; ++d) sum[d] += coefficient * row[d];
        }
    }

#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, softmax.maximum, distance);
        const float maximum = fmaxf(softmax.maximum, other);
        const float mine = expf(softmax.maximum - maximum), others = expf(other - maximum);
        softmax.maximum = maximum;
        softmax.sum = softmax.sum * mine + __shfl_xor_sync(kAllLanes, softmax.sum, distance) * others;
#pragma unroll
        for (int d = 0; d < kElements; ++d)
            sum[d] = sum[d] * mine + __shfl_xor_sync(kAllLanes, sum[d], distance) * others;
    }
    // From here on the first group's numbers count: the others' may differ in their last bit.
    softmax.maximum = __shfl_sync(kAllLanes, softmax.maximum, 0);
    softmax.sum = __shfl_sync(kAllLanes, softmax.sum, 0);

    group.load(row_of<const T>(p.table, positive), row);
    const float inverse_total = 1 / softmax.total(), positive_weight = softmax.sum * positive_norm.inverse;
#pragma unroll
    for (int d = 0; d < kElements; ++d) sum[d] = (sum[d] - positive_weight * row[d]) * inverse_total;
    const float product = group.sum(dot(query, sum));
    const float along = query_norm.clamped ? 0.0f : product * query_norm.inverse * query_norm.inverse;
    const float factor = query_norm.inverse * scale.inverse_temperature;
#pragma unroll
    for (int d = 0; d < kElements; ++d) sum[d] = (sum[d] - query[d] * along) * factor;
    if (group_index == 0) group.store(sum, p.dquery + t * p.dim);
    finish_row(p, t, lane, softmax, factor);
}

// The same for rows that do not fit in registers or are no whole vectors. One warp: one query. The 32 rows of a batch
// are read twice, first for their logits, then for the weighted sum, which lies in dquery; a lane has every 32nd column.
template <class T>
__global__ void __launch_bounds__(kThreads) sampled_forward_any_kernel(const SampledForwardParams p, Scale scale) {
    const int64_t t = warp_index();
    if (t >= p.rows) return;
    const int lane = threadIdx.x % 32;
    const T* const query = row_of<const T>(p.query, t);
    float* const dquery = p.dquery + t * p.dim;
    float* const logits = p.dsimilarity + t * (p.samples + 1) + 1;
    const auto with_query = [&](const T* row, float& product, float& square) {
        product = square = 0;
        for (int64_t d = lane; d < p.dim; d += 32) {
            const float x = to_float(row[d]);
            product += to_float(query[d]) * x;
            square += x * x;
        }
        product = sum_over<32>(product);
        square = sum_over<32>(square);
    };

    float product, square;
    with_query(query, product, square);
    const Norm query_norm(square, scale.inverse_eps);
    const int positive = p.inside(p.positive[t]);
    const T* const positive_row = row_of<const T>(p.table, positive);
    with_query(positive_row, product, square);
    const Norm positive_norm(square, scale.inverse_eps);
    Softmax softmax(product * query_norm.inverse * positive_norm.inverse * scale.inverse_temperature -
                    log_q_of(p, positive));
    for (int64_t d = lane; d < p.dim; d += 32) dquery[d] = 0;

    for (int64_t j0 = 0; j0 < p.samples; j0 += 32) {
        const Batch batch(p, t, j0 + lane, positive);
        const int count = static_cast<int>(min_of<int64_t>(32, p.samples - j0));
        const bool masked = batch.masked >> lane & 1;
        float logit = -INFINITY, inverse = 0;
        for (int i = 0; i < count; ++i) {
            with_query(row_of<const T>(p.table, __shfl_sync(kAllLanes, batch.item, i)), product, square);
            if (i != lane) continue;
            inverse = Norm(square, scale.inverse_eps).inverse;
            logit = product * query_norm.inverse * inverse * scale.inverse_temperature - batch.log_q;
        }
        if (lane < count) logits[j0 + lane] = masked ? -INFINITY : logit;
        if (masked && lane < count) logit = kMaskedLogit;
        float maximum = fmaxf(softmax.maximum, logit);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
        const float shrink = expf(softmax.maximum - maximum), weight = lane < count ? expf(logit - maximum) : 0.0f;
        const float coefficient = masked ? 0.0f : weight * inverse;
        softmax.maximum = maximum;
        softmax.sum = softmax.sum * shrink + sum_over<32>(weight);
        for (int64_t d0 = 0; d0 < p.dim; d0 += 32) {
            const int64_t d = d0 + lane;
            float sum = d < p.dim ? dquery[d] * shrink : 0.0f;
            for (int i = 0; i < count; ++i) {
                const T* const row = row_of<const T>(p.table, __shfl_sync(kAllLanes, batch.item, i));
                const float factor = __shfl_sync(kAllLanes, coefficient, i);
                if (d < p.dim) sum += factor * to_float(row[d]);
            }
            if (d < p.dim) dquery[d] = sum;
        }
    }

    const float inverse_total = 1 / softmax.total(), positive_weight = softmax.sum * positive_norm.inverse;
    product = 0;
    for (int64_t d = lane; d < p.dim; d += 32) {
        dquery[d] = (dquery[d] - positive_weight * to_float(positive_row[d])) * inverse_total;
        product += to_float(query[d]) * dquery[d];
    }
    product = sum_over<32>(product);
    const float along = query_norm.clamped ? 0.0f : product * query_norm.inverse * query_norm.inverse;
    const float factor = query_norm.inverse * scale.inverse_temperature;
    for (int64_t d = lane; d < p.dim; d += 32) dquery[d] = (dquery[d] - to_float(query[d]) * along) * factor;
    finish_row(p, t, lane, softmax, factor);
}

// Whether the pairs at `place` and before it have one item.
__device__ __forceinline__ bool joined(const SampledTableParams& p, int64_t place) {
    return place > 0 && place < p.pairs && p.pair_items[place - 1] == p.pair_items[place];
}

__device__ __forceinline__ int64_t row_of_pair(const SampledTableParams& p, int64_t place) {
    return p.pair_rows ? p.pair_rows[place] : p.pair_items[place];
}

// sums[v] = sum of dloss_t dsimilarity_tj query_t over the pairs of item v, as far as they lie in one chunk.
//
// One warp: one chunk of the sorted pairs, in their order, and one panel of the columns, 64 vectors. 32 pairs' numbers come at a
// time, a lane each; kAhead rows of the queries are under way at once. Where the item changes the sum is written: to the
// item's row; to partial[2 c] where it began in a chunk before this one, chunk c; else to partial[2 c + 1] where it goes
// on in the next.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) sampled_sum_kernel(const SampledTableParams p, int panels) {
    using Group = RowGroup<T, kWidth, 32, kPanelVectors / 32>;
    constexpr int kColumns = kPanelVectors * kWidth, kAhead = 4;
    const int64_t chunk = blockIdx.x / panels * int64_t{kWarps} + threadIdx.x / 32;
    const int64_t begin = chunk * p.chunk, end = min_of(begin + p.chunk, p.pairs);
    if (begin >= p.pairs) return;
    const int lane = threadIdx.x % 32;
    const int64_t column = blockIdx.x % panels * int64_t{kColumns};
    const Group group{static_cast<int>(min_of<int64_t>(p.dim - column, kColumns)), lane};
    const uint32_t pairs_a_query = static_cast<uint32_t>(p.samples + 1);

    typename Group::Row sum = {};
    bool began_before = joined(p, begin);
    for (int64_t place0 = begin; place0 < end; place0 += 32) {
        const int64_t place = place0 + lane;
        const int count = static_cast<int>(min_of<int64_t>(32, end - place0));
        uint32_t t = 0;
        float weight = 0;
        if (lane < count) {
            const uint32_t pair = p.order[place];
            t = pair / pairs_a_query;
            weight = p.dsimilarity[pair] * p.dloss[t];
        }
        const unsigned ends = __ballot_sync(kAllLanes, lane < count && (place + 1 == end || !joined(p, place + 1)));
        for (int i0 = 0; i0 < count; i0 += kAhead) {
            typename Group::Row rows[kAhead];
#pragma unroll
            for (int a = 0; a < kAhead; ++a)  // past the last pair: query 0, with a weight of 0
                group.load(row_of<const T>(p.query, __shfl_sync(kAllLanes, t, i0 + a)) + column, rows[a]);
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const float factor = __shfl_sync(kAllLanes, weight, i0 + a);
#pragma unroll
                for (int d = 0; d < Group::kElements; ++d) sum[d] += factor * rows[a][d];
                if (!(ends >> (i0 + a) & 1)) continue;
                const int64_t last = place0 + i0 + a;
                float* const to = began_before          ? p.partial + 2 * chunk * p.dim
                                  : joined(p, last + 1) ? p.partial + (2 * chunk + 1) * p.dim
                                                        : p.sums + row_of_pair(p, last) * p.dim;
                group.store(sum, to + column);
                began_before = false;
#pragma unroll
                for (float& value : sum) value = 0;
            }
        }
    }
}

// sums[v] for the items that lie in several chunks: partial[2 c + 1] + partial[2 c + 2] + partial[2 c + 4] + ..., where
// the item begins in chunk c and for as long as it goes on.
//
// One block: the item that goes on from chunk c, if there is one and it begins there. Its warps take 128 columns each;
// where there are many chunks they share the columns and take every kWarps-th chunk, and the first warp adds up in order.
__global__ void __launch_bounds__(kThreads) sampled_join_kernel(const SampledTableParams p, int64_t chunks) {
    constexpr int kManyChunks = 16, kColumns = 4;
    const int64_t chunk = blockIdx.x, next = (chunk + 1) * p.chunk;
    if (!joined(p, next)) return;
    const int item = p.pair_items[next];
    if (chunk > 0 && p.pair_items[chunk * p.chunk - 1] == item) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t last = chunk;
    for (int found = 32; found == 32; last += found) {
        const int64_t other = last + 1 + lane;
        const unsigned same = __ballot_sync(kAllLanes, other < chunks && p.pair_items[other * p.chunk] == item);
        found = same == kAllLanes ? 32 : __ffs(~same) - 1;
    }

    __shared__ float shared[kWarps][kColumns][32];
    const int sharing = last - chunk >= kManyChunks ? kWarps : 1;
    float* const to = p.sums + row_of_pair(p, next) * p.dim;
    for (int64_t d0 = warp / sharing * int64_t{32 * kColumns}; d0 < p.dim; d0 += kWarps / sharing * 32 * kColumns) {
        float sum[kColumns] = {};
#pragma unroll 4
        for (int64_t c = chunk + warp % sharing; c <= last; c += sharing) {
            const float* const from = p.partial + (2 * c + (c == chunk)) * p.dim + d0 + lane;
#pragma unroll
            for (int k = 0; k < kColumns; ++k)
                if (d0 + lane + 32 * k < p.dim) sum[k] += from[32 * k];
        }
        if (sharing > 1) {  // then all warps are at the same columns
#pragma unroll
            for (int k = 0; k < kColumns; ++k) shared[warp][k][lane] = sum[k];
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kColumns; ++k)
                for (int w = 1; w < kWarps; ++w) sum[k] += warp == 0 ? shared[w][k][lane] : 0.0f;
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
            if (warp % sharing == 0 && d0 + lane + 32 * k < p.dim) to[d0 + lane + 32 * k] = sum[k];
    }
}

// dtable[r] = J(sums[r]) at the table's row of item r. One warp: one row, read a second time, from the cache, to be
// written. Items without a pair get 0 whatever their row is.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) sampled_table_kernel(const SampledTableParams p, float inverse_eps) {
    const int64_t r = warp_index();
    if (r >= p.table_rows) return;
    const int first = threadIdx.x % 32 * kWidth;
    const T* const table = row_of<const T>(p.table, p.row_items ? p.row_items[r] : r);
    const float* const sums = p.sums + r * p.dim;
    T* const to = row_of<T>(p.dtable, r);
    float sum[kWidth], row[kWidth], product = 0, square = 0;
    bool any = false;
    for (int64_t d = first; d < p.dim; d += 32 * kWidth) {
        load<kWidth>(sums + d, sum);
#pragma unroll
        for (const float value : sum) any |= value != 0;
    }
    any = __any_sync(kAllLanes, any);
    if (any) {
        for (int64_t d = first; d < p.dim; d += 32 * kWidth) {
            load<kWidth>(sums + d, sum);
            load<kWidth>(table + d, row);
            product += dot(sum, row);
            square += dot(row, row);
        }
    }
    const Norm norm(sum_over<32>(square), inverse_eps);
    product = sum_over<32>(product);
    const float along = norm.clamped ? 0.0f : product * norm.inverse * norm.inverse;
    for (int64_t d = first; d < p.dim; d += 32 * kWidth) {
        load<kWidth>(sums + d, sum);
        if (any) {
            load<kWidth>(table + d, row);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sum[i] = (sum[i] - row[i] * along) * norm.inverse;
        }
        store<kWidth>(sum, to + d);
    }
}

template <class T, int kWidth, int kLanes, int kVectors>
void launch_forward(const SampledForwardParams& p, int device, cudaStream_t stream) {
    launch<&sampled_forward_kernel<T, kWidth, kLanes, kVectors>>(ceil_div<int64_t>(p.rows, kWarps), kThreads, 0, device,
                                                                 stream, p, Scale(p));
}

// Whether rows of vectors of kWidth elements fit in registers, and then the launch.
template <class T, int kWidth>
bool launch_forward_of(const SampledForwardParams& p, int device, cudaStream_t stream) {
    if (!has_vectors(p.query, p.dim, kWidth, sizeof(T)) || !has_vectors(p.table, p.dim, kWidth, sizeof(T)))
        return false;
    const int64_t vectors = p.dim / kWidth;
    if (vectors > 32 * 4) return false;
    if (vectors <= 8 * 2)
        launch_forward<T, kWidth, 8, 2>(p, device, stream);
    else if (vectors <= 16 * 2)
        launch_forward<T, kWidth, 16, 2>(p, device, stream);
    else if (vectors <= 16 * 4)
        launch_forward<T, kWidth, 16, 4>(p, device, stream);
    else
        launch_forward<T, kWidth, 32, 4>(p, device, stream);
    return true;
}

template <class T, int kWidth>
void launch_table(const SampledTableParams& p, int device, cudaStream_t stream) {
    const int64_t chunks = ceil_div(p.pairs, p.chunk);
    const auto panels = static_cast<int>(ceil_div<int64_t>(p.dim, kPanelVectors * kWidth));
    launch<&sampled_sum_kernel<T, kWidth>>(ceil_div<int64_t>(chunks, kWarps) * panels, kThreads, 0, device, stream, p,
                                           panels);
    launch<&sampled_join_kernel>(max_of<int64_t>(chunks - 1, 0), kThreads, 0, device, stream, p, chunks);
    launch<&sampled_table_kernel<T, kWidth>>(ceil_div<int64_t>(p.table_rows, kWarps), kThreads, 0, device, stream, p,
                                             static_cast<float>(1 / p.eps));
}

template <class T, int kWidth>
bool launch_table_of(const SampledTableParams& p, int device, cudaStream_t stream) {
    const bool vectors = has_vectors(p.query, p.dim, kWidth, sizeof(T)) &&
                         has_vectors(p.table, p.dim, kWidth, sizeof(T)) &&
                         has_vectors(p.dtable, p.dim, kWidth, sizeof(T));
    if (vectors) launch_table<T, kWidth>(p, device, stream);
    return vectors;
}

}  // namespace

// Rows are moved by 16 bytes, or by 8 (half types: 4). What is float lies at the start of buffers of torch, and so is
// aligned well enough where the rows are whole vectors.
void sampled_softmax_forward(const SampledForwardParams& p, DType dtype, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    with_element_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (!launch_forward_of<T, 16 / sizeof(T)>(p, device, stream) && !launch_forward_of<T, 2>(p, device, stream))
            launch<&sampled_forward_any_kernel<T>>(ceil_div<int64_t>(p.rows, kWarps), kThreads, 0, device, stream, p,
                                                   Scale(p));
    });
}

void sampled_softmax_table(const SampledTableParams& p, DType dtype, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    with_element_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (!launch_table_of<T, 16 / sizeof(T)>(p, device, stream) && !launch_table_of<T, 2>(p, device, stream))
            launch_table<T, 1>(p, device, stream);
    });
}

}  // namespace hstu::similarity::sm80
