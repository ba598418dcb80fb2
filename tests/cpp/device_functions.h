// CUDA's own functions that need no more than their arguments, for kernels' headers on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __ll2float_rn(int64_t x) { return static_cast<float>(x); }
inline float __ull2float_rz(uint64_t x) {
    const float rounded = static_cast<float>(x);
    return static_cast<long double>(rounded) > static_cast<long double>(x) ? std::nextafterf(rounded, 0.0f) : rounded;
}
inline float __uint2float_rz(uint32_t x) { return __ull2float_rz(x); }
inline unsigned long long __float2ull_rz(float x) {
    return x <= 0 ? 0 : x >= 0x1p64f ? ~0ull : static_cast<unsigned long long>(x);
}
