// Vectors of the compute type (float or double) as wide as the registers of the variant, and exp on them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
struct VectorOf;

template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class C>
using Vector = typename VectorOf<C>::Type;
template <class C>
using BitVector = typename VectorOf<C>::Bits;
template <class C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

// `n` rounded up to whole vectors and to the step of eight by which tensors are read and transposed.
template <class C>
constexpr int padded(int n) {
    constexpr int step = kLanes<C> > 8 ? kLanes<C> : 8;
    return (n + step - 1) / step * step;
}

#define HSTU_CPU_INLINE static inline __attribute__((always_inline))

template <class To, class From>
HSTU_CPU_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class C>
HSTU_CPU_INLINE Vector<C> load(const C* from) {
    Vector<C> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class C>
HSTU_CPU_INLINE void store(C* to, Vector<C> v) {
    std::memcpy(to, &v, sizeof(v));
}

// All ones in lane i when bit i of `bits` is set.
template <class C>
HSTU_CPU_INLINE BitVector<C> lanes_of(uint64_t bits) {
    BitVector<C> lane_bit;
    for (int i = 0; i < kLanes<C>; ++i) lane_bit[i] = 1 << i;
    const auto low = static_cast<decltype(lane_bit[0] + 0)>(bits & ((1u << kLanes<C>)-1));
    return (lane_bit & low) != 0;
}

// exp(x) for |x| <= limit; larger x count as the limit, NaN stays NaN. x = n ln2 + r, |r| <= ln2 / 2, and a minimax
// polynomial for (exp(r) - 1 - r) / r^2; relative error of the polynomial 1.1e-8 (float), 1.6e-17 (double).
template <class C>
struct ExpTable;

template <>
struct ExpTable<float> {
    static constexpr float limit = 80.0f;
    static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int mantissa_bits = 23;
    static constexpr float coefficients[] = {1.3926184e-03f, 8.363179e-03f, 4.1666556e-02f, 1.6666576e-01f, 0.5f};
};

template <>
struct ExpTable<double> {
    static constexpr double limit = 700.0;
    static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.6931467056274414, ln2_low = 4.7493250390316726e-07;
    static constexpr int mantissa_bits = 52;
    static constexpr double coefficients[] = {2.510038549551032e-08,  2.7620088445409746e-07, 2.7557268459997064e-06,
                                              2.4801521295954376e-05, 0.00019841269863053618, 0.0013888888917213717,
                                              0.008333333333330062,   0.04166666666662413,    0.16666666666666669,
                                              0.5000000000000001};
};

template <class C>
HSTU_CPU_INLINE Vector<C> exp_of(Vector<C> x) {
    using Table = ExpTable<C>;
    const Vector<C> limit = Vector<C>{} + Table::limit;
    x = x > limit ? limit : x;
    x = x < -limit ? -limit : x;
    const Vector<C> shifted = x * C(1.4426950408889634) + Table::shifter;
    const Vector<C> n = shifted - Table::shifter;
    const Vector<C> r = x - n * Table::ln2_high - n * Table::ln2_low;
    Vector<C> poly = Vector<C>{} + Table::coefficients[0];
    for (unsigned i = 1; i < sizeof(Table::coefficients) / sizeof(C); ++i) poly = poly * r + Table::coefficients[i];
    poly = poly * (r * r) + (r + C(1));
    // Adding n to the exponent field: exact, since |x| <= limit keeps the result normal.
    const BitVector<C> exponent = bit_cast<BitVector<C>>(shifted) << Table::mantissa_bits;
    return bit_cast<Vector<C>>(bit_cast<BitVector<C>>(poly) + exponent);
}

// 1 / x for x >= 1 (or NaN).
template <class C>
HSTU_CPU_INLINE Vector<C> reciprocal(Vector<C> x) {
#if defined(__AVX512F__)
    // Division is far slower than the 14-bit estimate with one Newton step, and the step leaves about 1 ulp.
    if constexpr (sizeof(C) == sizeof(float)) {
        const Vector<C> estimate = bit_cast<Vector<C>>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
        return estimate + estimate * (C(1) - x * estimate);
    }
#endif
    return C(1) / x;
}

// sigma(x) = 1 / (1 + exp(-x))
template <class C>
HSTU_CPU_INLINE Vector<C> sigmoid(Vector<C> x) {
    return reciprocal<C>(exp_of<C>(-x) + C(1));
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
