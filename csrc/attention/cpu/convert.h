// Elements of tensors to and from the compute type, eight at a time: every head dimension is a multiple of eight.
#pragma once

#include "attention/cpu/simd.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class T>
struct ComputeOf {
    using Type = float;
};
template <>
struct ComputeOf<double> {
    using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

HSTU_CPU_INLINE void load8(const float* from, float* to) { std::memcpy(to, from, 8 * sizeof(float)); }
HSTU_CPU_INLINE void load8(const double* from, double* to) { std::memcpy(to, from, 8 * sizeof(double)); }
HSTU_CPU_INLINE void store8(const float* from, float* to) { std::memcpy(to, from, 8 * sizeof(float)); }
HSTU_CPU_INLINE void store8(const double* from, double* to) { std::memcpy(to, from, 8 * sizeof(double)); }

HSTU_CPU_INLINE void load8(const BFloat16* from, float* to) {
    Short8 upper;
    std::memcpy(&upper, from, sizeof(upper));
    const UInt8 bits = __builtin_convertvector(upper, UInt8) << 16;
    std::memcpy(to, &bits, sizeof(bits));
}

// Round to nearest even; NaN keeps a non-zero mantissa.
HSTU_CPU_INLINE void store8(const float* from, BFloat16* to) {
    UInt8 bits;
    std::memcpy(&bits, from, sizeof(bits));
    const UInt8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UInt8 nan = (bits >> 16) | 0x40u;
    const UInt8 result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
    const Short8 upper = __builtin_convertvector(result, Short8);
    std::memcpy(to, &upper, sizeof(upper));
}

#if defined(__F16C__)

HSTU_CPU_INLINE void load8(const Half* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

HSTU_CPU_INLINE void store8(const float* from, Half* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}

#else

// The 15 low bits, moved into a float, are the value times 2^-112, subnormals included.
HSTU_CPU_INLINE void load8(const Half* from, float* to) {
    Short8 packed;
    std::memcpy(&packed, from, sizeof(packed));
    const UInt8 half = __builtin_convertvector(packed, UInt8);
    const UInt8 magnitude = (half & 0x7fffu) << 13;
    const Float8 value = bit_cast<Float8>(magnitude) * 5.192296858534828e+33f;  // 2^112
    const UInt8 special = magnitude >= (0x7c00u << 13) ? UInt8{} + 0x7f800000u : UInt8{};
    const UInt8 result = bit_cast<UInt8>(value) | special | ((half & 0x8000u) << 16);
    std::memcpy(to, &result, sizeof(result));
}

// Round to nearest even. Below 2^-14 adding 0.5 leaves the subnormal's bits at the bottom of the mantissa.
HSTU_CPU_INLINE void store8(const float* from, Half* to) {
    UInt8 bits;
    std::memcpy(&bits, from, sizeof(bits));
    const UInt8 magnitude = bits & 0x7fffffffu;
    const UInt8 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const UInt8 subnormal = bit_cast<UInt8>(bit_cast<Float8>(magnitude) + 0.5f) - 0x3f000000u;
    const UInt8 special = magnitude > 0x7f800000u ? UInt8{} + 0x7e00u : UInt8{} + 0x7c00u;
    UInt8 result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? special : result;  // 65520 and above round to infinity
    const Short8 packed = __builtin_convertvector(result | ((bits & 0x80000000u) >> 16), Short8);
    std::memcpy(to, &packed, sizeof(packed));
}

#endif

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
