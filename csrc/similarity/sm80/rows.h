// Rows in registers, in fp32: a group of lanes shares a row, each lane has every kLanes-th vector of kWidth elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// What one instruction moves: at most 16 bytes, aligned to their number.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Packet {
    T at[kCount];
};
template <class T, int kWidth>
constexpr int kPacket = kWidth * sizeof(T) > 16 ? 16 / sizeof(T) : kWidth;

template <int kWidth, class T>
__device__ __forceinline__ void load(const T* from, float* to) {
    constexpr int kCount = kPacket<T, kWidth>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
        const auto packet = *reinterpret_cast<const Packet<T, kCount>*>(from + i);
#pragma unroll
        for (int k = 0; k < kCount; ++k) to[i + k] = to_float(packet.at[k]);
    }
}

template <int kWidth, class T>
__device__ __forceinline__ void store(const float* from, T* to) {
    constexpr int kCount = kPacket<T, kWidth>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
        Packet<T, kCount> packet;
#pragma unroll
        for (int k = 0; k < kCount; ++k) packet.at[k] = from_float<T>(from[i + k]);
        *reinterpret_cast<Packet<T, kCount>*>(to + i) = packet;
    }
}

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& m, int64_t row) {
    return static_cast<T*>(m.data) + row * m.stride;
}

template <int kCount>
__device__ __forceinline__ float dot(const float (&a)[kCount], const float (&b)[kCount]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += a[i] * b[i];
    return sum;
}

// Over groups of kLanes neighbours. Every lane of the warp calls it, and all of a group get the same bits.
template <int kLanes>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

// x / max(|x|, eps) is x * inverse. Below eps the divisor is a constant, so the gradient has no part along x.
struct Norm {
    float inverse;
    bool clamped;

    __device__ __forceinline__ Norm(float square, float inverse_eps) {
        inverse = rsqrtf(square);
        clamped = inverse > inverse_eps;
        if (clamped) inverse = inverse_eps;
    }
};

// A group's part of a row of at most kVectors * kLanes vectors. `lane` is the lane's place in the group.
template <class T, int kWidth_, int kLanes_, int kVectors_>
struct RowGroup {
    static constexpr int kWidth = kWidth_, kLanes = kLanes_, kVectors = kVectors_, kElements = kWidth * kVectors;
    using Element = T;
    using Row = float[kElements];

    int dim, lane;

    __device__ __forceinline__ int column(int vector) const { return (vector * kLanes + lane) * kWidth; }

    // Columns from dim on become 0.
    template <class From>
    __device__ __forceinline__ void load(const From* row, Row& x) const {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (column(v) < dim) {
                sm80::load<kWidth>(row + column(v), x + v * kWidth);
            } else {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) x[v * kWidth + k] = 0;
            }
        }
    }

    template <class To>
    __device__ __forceinline__ void store(const Row& x, To* row) const {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            if (column(v) < dim) sm80::store<kWidth>(x + v * kWidth, row + column(v));
    }

    __device__ __forceinline__ static float sum(float x) { return sum_over<kLanes>(x); }
};

// Whether rows of `dim` elements are whole vectors of `width` elements that lie at multiples of their size.
inline bool has_vectors(const Matrix& m, int64_t dim, int width, int element_bytes) {
    const int64_t bytes = int64_t{width} * element_bytes;
    return dim % width == 0 && reinterpret_cast<uintptr_t>(m.data) % bytes == 0 &&
           m.stride * element_bytes % bytes == 0;
}

// body(T{}) with the element type of a GPU tensor.
template <class Body>
void with_element_type(DType dtype, const Body& body) {
    if (dtype == DType::kFloat16) return body(__half{});
    if (dtype == DType::kBFloat16) return body(__nv_bfloat16{});
    body(float{});
}

}  // namespace hstu::similarity::sm80
