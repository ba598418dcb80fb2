// Sums of floats that do not depend on the order of their terms: a fixed-point number as wide as the range of fp32, in
// ten 64-bit words that are added to by atomics. Word k < 9 counts units of 2^(32 k - 149) and takes 32 bits of a term,
// so that 2^31 terms fit; the last word counts terms that are not finite.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace hstu::attention {

__device__ __forceinline__ void add_exactly(int64_t* words, float x) {
    const auto add = [&](int k, int64_t value) {
        atomicAdd(reinterpret_cast<unsigned long long*>(words + k), static_cast<unsigned long long>(value));
    };
    const uint32_t bits = __float_as_uint(x), exponent = bits >> 23 & 0xff;
    if (exponent == 0xff) return add(kExactWords - 1, 1);
    const uint32_t mantissa = (bits & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
    const int shift = exponent > 0 ? static_cast<int>(exponent) - 1 : 0;  // x is mantissa * 2^(shift - 149)
    const uint64_t units = static_cast<uint64_t>(mantissa) << (shift % 32);
    const int64_t low = static_cast<uint32_t>(units), high = static_cast<int64_t>(units >> 32);
    const bool negative = bits >> 31;
    if (low != 0) add(shift / 32, negative ? -low : low);
    if (high != 0) add(shift / 32 + 1, negative ? -high : high);
}

__device__ __forceinline__ float exact_sum(const int64_t* words) {
    if (words[kExactWords - 1] != 0) return __int_as_float(0x7fffffff);
    int64_t digit[kExactWords];
    // Carries upwards; the sign is then that of the top digit.
    const auto carry = [&] {
        for (int k = 0; k + 1 < kExactWords; ++k) {
            digit[k + 1] += digit[k] >> 32;
            digit[k] &= 0xffffffff;
        }
    };
    for (int k = 0; k < kExactWords; ++k) digit[k] = k < kExactWords - 1 ? words[k] : 0;
    carry();
    const bool negative = digit[kExactWords - 1] < 0;
    if (negative) {
        for (int k = 0; k < kExactWords; ++k) digit[k] = -digit[k];
        carry();
    }
    double sum = 0.0;
    for (int k = kExactWords - 1; k >= 0; --k) sum += ldexp(static_cast<double>(digit[k]), 32 * k - 149);
    return static_cast<float>(negative ? -sum : sum);
}

}  // namespace hstu::attention
