// The in-batch softmax between its matrix products, on tiles of fp32 dot products d_ij of queries and items:
//
//     s_ij = d_ij / (|query_i| |item_j|), norms at least eps
//     l_ij = s_ij / temperature - log_q[j]       over the positive and every item j that is kept as a negative
//     loss_i = log sum_j exp(l_ij) - l_i,positive
//
// One block: kRows rows of the tile, so that what is read of a column serves kRows logits. Its threads walk over the
// columns, kAhead at a time. Forward: each thread keeps a maximum and a sum, which the block adds up at the end and merges
// into what earlier tiles left. Backward: a step's similarities are all read before any of its gradients, which may be
// narrower and are written to the front of the same row, overwrites them; so one buffer serves both.
#include "similarity/sm80/in_batch_softmax.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common/cuda_launch.h"
#include "similarity/sm80/in_batch_records.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kThreads = 256, kRows = 4, kAhead = 4, kStep = kThreads * kAhead;

// The rows of one block: all that a logit depends on besides its column.
struct RowGroup {
    int64_t first;  // in the tile
    QueryRecord query[kRows];
    float positive_inverse[kRows];
    const float* similarity[kRows];
    const float* duplicate[kRows];
    int count;

    __device__ __forceinline__ RowGroup(const InBatchParams& p) : first(int64_t{blockIdx.x} * kRows) {
        count = static_cast<int>(min_of<int64_t>(kRows, p.rows - first));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = first + min_of(r, count - 1);
            query[r] = static_cast<const QueryRecord*>(p.query_records)[p.row0 + row];
            positive_inverse[r] = static_cast<const ItemRecord*>(p.item_records)[query[r].positive].inverse;
            similarity[r] = static_cast<const float*>(p.similarity.data) + row * p.similarity.stride;
            duplicate[r] =
                p.duplicate.data ? static_cast<const float*>(p.duplicate.data) + row * p.duplicate.stride : nullptr;
        }
    }
};

// logits[r] of column `col` of the tile, -inf where masked.
__device__ __forceinline__ void logits_of(const InBatchParams& p, const RowGroup& rows, int64_t col,
                                          float (&logits)[kRows]) {
    const ItemRecord item = static_cast<const ItemRecord*>(p.item_records)[p.col0 + col];
    const float threshold = static_cast<float>(p.threshold);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const bool masked =
            is_masked(rows.query[r], item) ||
            (rows.duplicate[r] && rows.duplicate[r][col] * item.inverse * rows.positive_inverse[r] > threshold);
        const float logit = rows.similarity[r][col] * item.inverse * rows.query[r].scale - item.log_q;
        logits[r] = masked && p.col0 + col != rows.query[r].positive ? -INFINITY : logit;
    }
}

// A maximum and the sum of exp(x - maximum). Until something is above -inf the terms are 0; a NaN stays in the sum.
struct Softmax {
    float maximum = -INFINITY, sum = 0.0f;

    __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
        const float top = fmaxf(maximum, other_maximum), shift = top == -INFINITY ? 0.0f : top;
        sum = sum * expf(maximum - shift) + other_sum * expf(other_maximum - shift);
        maximum = top;
    }
};

__global__ void __launch_bounds__(kThreads) in_batch_forward_kernel(const __grid_constant__ InBatchParams p) {
    const RowGroup rows(p);
    Softmax softmax[kRows];
    for (int64_t col0 = threadIdx.x; col0 < p.cols; col0 += kStep) {
        float logits[kAhead][kRows];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t col = col0 + i * kThreads;
            if (col < p.cols) {
                logits_of(p, rows, col, logits[i]);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    if (p.col0 + col == rows.query[r].positive && r < rows.count)
                        static_cast<float*>(p.positive_logit)[p.row0 + rows.first + r] = logits[i][r];
            } else {
#pragma unroll
                for (int r = 0; r < kRows; ++r) logits[i][r] = -INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float top = logits[0][r];
#pragma unroll
            for (int i = 1; i < kAhead; ++i) top = fmaxf(top, logits[i][r]);
            const float shift = top == -INFINITY ? 0.0f : top;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) sum += expf(logits[i][r] - shift);
            softmax[r].merge(top, sum);
        }
    }

    __shared__ Softmax parts[kRows][kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const float maximum = __shfl_xor_sync(0xffffffffu, softmax[r].maximum, step);
            const float sum = __shfl_xor_sync(0xffffffffu, softmax[r].sum, step);
            softmax[r].merge(maximum, sum);
        }
        if (lane == 0) parts[r][warp] = softmax[r];
    }
    __syncthreads();
    if (threadIdx.x >= rows.count) return;
    const int64_t t = p.row0 + rows.first + threadIdx.x;
    float& maximum = static_cast<float*>(p.maximum)[t];
    float& sum = static_cast<float*>(p.sum)[t];
    Softmax all{maximum, sum};
    for (int i = 0; i < kThreads / 32; ++i) all.merge(parts[threadIdx.x][i].maximum, parts[threadIdx.x][i].sum);
    maximum = all.maximum;
    sum = all.sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) in_batch_backward_kernel(const __grid_constant__ InBatchParams p) {
    const RowGroup rows(p);
    float lse[kRows], scale[kRows];
    T* gradient[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = rows.first + min_of(r, rows.count - 1), t = p.row0 + row;
        lse[r] = static_cast<const float*>(p.lse)[t];
        scale[r] = static_cast<const float*>(p.dloss)[t] * static_cast<float>(p.inv_temperature);
        gradient[r] = reinterpret_cast<T*>(static_cast<float*>(p.similarity.data) + row * p.similarity.stride);
    }
    for (int64_t begin = 0; begin < p.cols; begin += kStep) {
        float logits[kAhead][kRows];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t col = begin + i * kThreads + threadIdx.x;
            if (col < p.cols) logits_of(p, rows, col, logits[i]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t col = begin + i * kThreads + threadIdx.x;
            if (col >= p.cols) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (r >= rows.count) continue;
                const float weight =
                    expf(logits[i][r] - lse[r]) - (p.col0 + col == rows.query[r].positive ? 1.0f : 0.0f);
                gradient[r][col] = static_cast<T>(weight * scale[r]);
            }
        }
    }
}

template <class T>
void backward(const InBatchParams& p, int device, cudaStream_t stream) {
    launch<in_batch_backward_kernel<T>>(ceil_div<int64_t>(p.rows, kRows), kThreads, 0, device, stream, p);
}

}  // namespace

void in_batch_softmax_forward(const InBatchParams& p, int device, void* stream) {
    launch<in_batch_forward_kernel>(ceil_div<int64_t>(p.rows, kRows), kThreads, 0, device,
                                    static_cast<cudaStream_t>(stream), p);
}

void in_batch_softmax_backward(const InBatchParams& p, DType dtype, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    switch (dtype) {
        case DType::kBFloat16: return backward<__nv_bfloat16>(p, device, stream);
        case DType::kFloat16: return backward<__half>(p, device, stream);
        default: return backward<float>(p, device, stream);
    }
}

}  // namespace hstu::similarity::sm80
