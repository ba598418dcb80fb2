// Rows of elements as fp32 vectors, a warp a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/host_device.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// kSize neighbouring elements, read and written at once.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Chunk {
    T x[kSize];

    __device__ __forceinline__ static Chunk load(const T* from) { return *reinterpret_cast<const Chunk*>(from); }
    __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Chunk*>(to) = *this; }
    __device__ __forceinline__ float operator[](int i) const { return static_cast<float>(x[i]); }
    __device__ __forceinline__ void set(int i, float value) { x[i] = static_cast<T>(value); }
};

template <class T>
constexpr int kChunk = 16 / sizeof(T);

// Whether rows of this matrix can be read 16 bytes at a time.
template <class T>
bool has_aligned_rows(const Matrix& x, int64_t dim) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % kChunk<T> == 0 && dim % kChunk<T> == 0;
}

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& x, int64_t row) {
    return static_cast<T*>(x.data) + row * x.stride;
}

// 1 / max(|x|, eps) of a squared norm; clamped: eps it was.
struct InverseNorm {
    float value;
    bool clamped;

    __device__ __forceinline__ InverseNorm(float square, float eps) {
        const float norm = sqrtf(square);
        clamped = norm < eps;
        value = 1.0f / (clamped ? eps : norm);
    }
};

}  // namespace hstu::similarity::sm80
