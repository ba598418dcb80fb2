// bfloat16 as the kernels use it.
#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
    uint16_t bits = 0;

    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        bits = x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    explicit operator float() const {
        const uint32_t u = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
