// out = x / n with n = max(|x|, eps), and dx = (dout - out (out . dout)) / n; below eps only dx = dout / eps.
//
// A warp a row, 16 bytes a lane where rows are aligned. The row is read twice, the second time from the first cache.
#include "similarity/sm80/l2norm.h"

#include "common/cuda_launch.h"
#include "similarity/sm80/rows.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kWarps = 8;

// Calls visit(column) for this lane's chunks of a row.
template <int kSize, class Visit>
__device__ __forceinline__ void for_chunks(int64_t dim, const Visit& visit) {
#pragma unroll 4
    for (int64_t col = threadIdx.x % 32 * kSize; col < dim; col += 32 * kSize) visit(col);
}

__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

template <class T, int kSize>
__global__ void __launch_bounds__(kWarps * 32) l2norm_kernel(const __grid_constant__ L2NormParams p) {
    using Elements = Chunk<T, kSize>;
    const int64_t row = row_of_warp();
    if (row >= p.rows) return;
    const T* const x = row_of<const T>(p.x, row);
    T* const out = row_of<T>(p.out, row);
    float square = 0.0f;
    for_chunks<kSize>(p.dim, [&](int64_t col) {
        const Elements from = Elements::load(x + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) square += from[i] * from[i];
    });
    const InverseNorm norm(warp_sum(square), static_cast<float>(p.eps));
    for_chunks<kSize>(p.dim, [&](int64_t col) {
        Elements chunk = Elements::load(x + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) chunk.set(i, chunk[i] * norm.value);
        chunk.store(out + col);
    });
}

template <class T, int kSize>
__global__ void __launch_bounds__(kWarps * 32) l2norm_backward_kernel(const __grid_constant__ L2NormParams p) {
    using Elements = Chunk<T, kSize>;
    const int64_t row = row_of_warp();
    if (row >= p.rows) return;
    const T* const x = row_of<const T>(p.x, row);
    const T* const dout = row_of<const T>(p.dout, row);
    T* const dx = row_of<T>(p.out, row);
    float square = 0.0f, product = 0.0f;
    for_chunks<kSize>(p.dim, [&](int64_t col) {
        const Elements from = Elements::load(x + col), gradient = Elements::load(dout + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            square += from[i] * from[i];
            product += from[i] * gradient[i];
        }
    });
    const InverseNorm norm(warp_sum(square), static_cast<float>(p.eps));
    product = warp_sum(product);
    const float along = norm.clamped ? 0.0f : -product * norm.value * norm.value * norm.value;
    for_chunks<kSize>(p.dim, [&](int64_t col) {
        const Elements from = Elements::load(x + col);
        Elements gradient = Elements::load(dout + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) gradient.set(i, norm.value * gradient[i] + along * from[i]);
        gradient.store(dx + col);
    });
}

template <class T>
void forward(const L2NormParams& p, int device, cudaStream_t stream) {
    const int64_t blocks = ceil_div<int64_t>(p.rows, kWarps);
    if (has_aligned_rows<T>(p.x, p.dim) && has_aligned_rows<T>(p.out, p.dim))
        launch<l2norm_kernel<T, kChunk<T>>>(blocks, kWarps * 32, 0, device, stream, p);
    else
        launch<l2norm_kernel<T, 1>>(blocks, kWarps * 32, 0, device, stream, p);
}

template <class T>
void backward(const L2NormParams& p, int device, cudaStream_t stream) {
    const int64_t blocks = ceil_div<int64_t>(p.rows, kWarps);
    if (has_aligned_rows<T>(p.x, p.dim) && has_aligned_rows<T>(p.dout, p.dim) && has_aligned_rows<T>(p.out, p.dim))
        launch<l2norm_backward_kernel<T, kChunk<T>>>(blocks, kWarps * 32, 0, device, stream, p);
    else
        launch<l2norm_backward_kernel<T, 1>>(blocks, kWarps * 32, 0, device, stream, p);
}

}  // namespace

void l2norm(const L2NormParams& p, DType dtype, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    switch (dtype) {
        case DType::kBFloat16: return forward<__nv_bfloat16>(p, device, stream);
        case DType::kFloat16: return forward<__half>(p, device, stream);
        default: return forward<float>(p, device, stream);
    }
}

void l2norm_backward(const L2NormParams& p, DType dtype, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    switch (dtype) {
        case DType::kBFloat16: return backward<__nv_bfloat16>(p, device, stream);
        case DType::kFloat16: return backward<__half>(p, device, stream);
        default: return backward<float>(p, device, stream);
    }
}

}  // namespace hstu::similarity::sm80
