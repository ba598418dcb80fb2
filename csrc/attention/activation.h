// SiLU and its derivative on the GPU, each from one hyperbolic tangent: with h = x / 2,
//   silu(x)  = x * sigmoid(x)                      = h + h * tanh(h)
//   silu'(x) = sigmoid(x) + silu(x) * (1 - sigmoid(x)),  sigmoid(x) = (1 + tanh(h)) / 2
#pragma once

#include <cmath>

namespace hstu::attention {

__device__ __forceinline__ float fast_tanh(float x) {
#if defined(__CUDACC__)
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return tanhf(x);  // the kernels' tests on a CPU
#endif
}

// silu(2h)
__device__ __forceinline__ float silu_of_twice(float h) { return fmaf(h, fast_tanh(h), h); }

struct SiluAndSlope {
    float value, slope;
};

// silu(2h) and silu'(2h)
__device__ __forceinline__ SiluAndSlope silu_and_slope_of_twice(float h) {
    const float t = fast_tanh(h);
    const float value = fmaf(h, t, h);
    const float sigmoid = fmaf(0.5f, t, 0.5f);
    return {value, fmaf(sigmoid, 1.0f - value, value)};
}

struct TwiceSiluSlope {
    float value, twice_slope_minus_one;
};

// silu(2h) and 2 silu'(2h) - 1, an operation less than the slope itself
__device__ __forceinline__ TwiceSiluSlope twice_silu_slope(float h) {
    const float t = fast_tanh(h);
    const float value = fmaf(h, t, h);
    return {value, fmaf(-value, t, value) + t};
}

}  // namespace hstu::attention
