// float16 where the kernels keep something in it; the tests' tensors are bfloat16.
#pragma once

#include "emulator.h"

struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {{static_cast<_Float16>(x)}, {static_cast<_Float16>(y)}}; }
inline float2 __half22float2(__half2 h) { return {static_cast<float>(h.x.value), static_cast<float>(h.y.value)}; }
