// float16 is declared so that the kernels compile; the tests use bfloat16.
#pragma once

#include <cstdint>

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
__half2 __floats2half2_rn(float x, float y);
