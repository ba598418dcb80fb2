// HSTU_HOST_DEVICE marks functions shared by host code, CPU kernels and CUDA kernels.
// They are always inlined, so no copy compiled for one instruction set can be linked into code meant for another.
#pragma once

#if defined(__CUDACC__)
#define HSTU_HOST_DEVICE __host__ __device__ __forceinline__
#define HSTU_PRAGMA(text) _Pragma(#text)
#define HSTU_UNROLL(count) HSTU_PRAGMA(unroll count)
#elif defined(__GNUC__)
#define HSTU_HOST_DEVICE inline __attribute__((always_inline))
#else
#define HSTU_HOST_DEVICE inline
#endif
#if !defined(HSTU_UNROLL)
#define HSTU_UNROLL(count)
#endif

namespace hstu {

template <class T>
HSTU_HOST_DEVICE constexpr T min_of(T a, T b) {
    return b < a ? b : a;
}

template <class T>
HSTU_HOST_DEVICE constexpr T max_of(T a, T b) {
    return a < b ? b : a;
}

template <class T>
HSTU_HOST_DEVICE constexpr T clamp_to(T x, T low, T high) {
    return max_of(low, min_of(x, high));
}

template <class T>
HSTU_HOST_DEVICE constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

}  // namespace hstu
