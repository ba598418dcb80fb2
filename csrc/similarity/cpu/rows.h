// Rows of any length brought into the compute type, and the few vector operations on them that the kernels are made of.
#pragma once

#include "attention/cpu/convert.h"
#include "similarity/params.h"

namespace hstu::similarity::cpu::HSTU_CPU_VARIANT {

using namespace attention::cpu::HSTU_CPU_VARIANT;

// Not std::sqrt and std::exp, whose wrappers the variants would share.
HSTU_CPU_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
HSTU_CPU_INLINE double square_root(double x) { return __builtin_sqrt(x); }
HSTU_CPU_INLINE float exponential(float x) { return __builtin_expf(x); }
HSTU_CPU_INLINE double exponential(double x) { return __builtin_exp(x); }
HSTU_CPU_INLINE float logarithm(float x) { return __builtin_logf(x); }
HSTU_CPU_INLINE double logarithm(double x) { return __builtin_log(x); }

// Hands out 64-byte aligned parts of a call's scratch.
class Scratch {
  public:
    explicit Scratch(void* begin) : next_(static_cast<char*>(begin)) {}

    template <class C>
    C* take(int64_t count) {
        C* part = reinterpret_cast<C*>(next_);
        next_ += (count * static_cast<int64_t>(sizeof(C)) + 63) / 64 * 64;
        return part;
    }

  private:
    char* next_;
};

template <class T>
HSTU_CPU_INLINE T* row_of(const Matrix& m, int64_t row) {
    return static_cast<T*>(m.data) + row * m.stride;
}

// The row in the compute type: itself where it already is, else converted into `buffer`.
HSTU_CPU_INLINE const float* as_compute(const float* row, int64_t, float*) { return row; }
HSTU_CPU_INLINE const double* as_compute(const double* row, int64_t, double*) { return row; }
template <class T>
HSTU_CPU_INLINE const float* as_compute(const T* row, int64_t dim, float* buffer) {
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) load8(row + d, buffer + d);
    if (d < dim) {
        T rest[8] = {};
        float wide[8];
        std::memcpy(rest, row + d, (dim - d) * sizeof(T));
        load8(rest, wide);
        std::memcpy(buffer + d, wide, (dim - d) * sizeof(float));
    }
    return buffer;
}

template <class C>
struct EightOf {
    typedef C Type __attribute__((vector_size(8 * sizeof(C))));
};
template <class C>
using Eight = typename EightOf<C>::Type;

// The first `count` of eight elements, then zeros.
template <class C>
HSTU_CPU_INLINE Eight<C> load_eight(const C* from, int64_t count) {
    Eight<C> x = {};
    if (count >= 8)
        std::memcpy(&x, from, sizeof(x));
    else
        std::memcpy(&x, from, count * sizeof(C));
    return x;
}

// to[d] = sum(d, count), a vector of the elements from d on, of which the first `count` count; rounded to T.
template <class C, class T, class Sum>
HSTU_CPU_INLINE void store_eights(int64_t dim, T* to, const Sum& sum) {
    C wide[8];
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
        const Eight<C> x = sum(d, 8);
        std::memcpy(wide, &x, sizeof(x));
        store8(wide, to + d);
    }
    if (d < dim) {
        T rest[8];
        const Eight<C> x = sum(d, dim - d);
        std::memcpy(wide, &x, sizeof(x));
        store8(wide, rest);
        std::memcpy(to + d, rest, (dim - d) * sizeof(T));
    }
}

template <class T, class C>
HSTU_CPU_INLINE void store_scaled(const C* from, C scale, int64_t dim, T* to) {
    store_eights<C>(dim, to, [&](int64_t d, int64_t count) { return load_eight(from + d, count) * scale; });
}

template <class T, class C>
HSTU_CPU_INLINE void store_sum(const C* from, C scale, const C* other, C other_scale, int64_t dim, T* to) {
    store_eights<C>(dim, to, [&](int64_t d, int64_t count) {
        return load_eight(from + d, count) * scale + load_eight(other + d, count) * other_scale;
    });
}

template <class C>
HSTU_CPU_INLINE C sum_of(Vector<C> v) {
    C sum = 0;
    for (int i = 0; i < kLanes<C>; ++i) sum += v[i];
    return sum;
}

// The first `count` < kLanes elements, then zeros.
template <class C>
HSTU_CPU_INLINE Vector<C> load_part(const C* from, int64_t count) {
    C part[kLanes<C>] = {};
    std::memcpy(part, from, count * sizeof(C));
    return load(part);
}

template <class C>
HSTU_CPU_INLINE C dot(const C* a, const C* b, int64_t dim) {
    constexpr int lanes = kLanes<C>;
    Vector<C> sum = {}, second = {};
    int64_t d = 0;
    for (; d + 2 * lanes <= dim; d += 2 * lanes) {
        sum += load(a + d) * load(b + d);
        second += load(a + d + lanes) * load(b + d + lanes);
    }
    for (; d + lanes <= dim; d += lanes) sum += load(a + d) * load(b + d);
    if (d < dim) second += load_part(a + d, dim - d) * load_part(b + d, dim - d);
    return sum_of<C>(sum + second);
}

// a . b and b . b in one pass over b.
template <class C>
HSTU_CPU_INLINE void dot_and_square(const C* a, const C* b, int64_t dim, C& product, C& square) {
    constexpr int lanes = kLanes<C>;
    Vector<C> products = {}, squares = {};
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) {
        const Vector<C> x = load(b + d);
        products += load(a + d) * x;
        squares += x * x;
    }
    if (d < dim) {
        const Vector<C> x = load_part(b + d, dim - d);
        products += load_part(a + d, dim - d) * x;
        squares += x * x;
    }
    product = sum_of<C>(products);
    square = sum_of<C>(squares);
}

// to += scale * from
template <class C>
HSTU_CPU_INLINE void add_scaled(const C* from, C scale, int64_t dim, C* to) {
    constexpr int lanes = kLanes<C>;
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) store(to + d, load(to + d) + load(from + d) * scale);
    for (; d < dim; ++d) to[d] += scale * from[d];
}

// The norm of a row as the kernels use it: x / max(|x|, eps) is x * inverse. Below eps the divisor is a constant, so
// the gradient has no part along x.
template <class C>
struct Norm {
    C inverse;
    bool clamped;

    Norm(C square, double eps) {
        const C norm = square_root(square);
        clamped = norm < C(eps);
        inverse = C(1) / (clamped ? C(eps) : norm);
    }
};

template <class C>
HSTU_CPU_INLINE C maximum_of(const C* x, int64_t count) {
    constexpr int lanes = kLanes<C>;
    C result = -__builtin_inf();
    int64_t j = 0;
    if (count >= lanes) {
        Vector<C> high = load(x);
        for (j = lanes; j + lanes <= count; j += lanes) {
            const Vector<C> v = load(x + j);
            high = v > high ? v : high;
        }
        for (int i = 0; i < lanes; ++i) result = high[i] > result ? high[i] : result;
    }
    for (; j < count; ++j) result = x[j] > result ? x[j] : result;
    return result;
}

// x[j] = exp(x[j] - shift) in place, 0 where exp_of would stop falling; returns their sum.
template <class C>
HSTU_CPU_INLINE C exp_shifted(C* x, C shift, int64_t count) {
    constexpr int lanes = kLanes<C>;
    Vector<C> sum = {};
    int64_t j = 0;
    for (; j + lanes <= count; j += lanes) {
        const Vector<C> power = load(x + j) - shift;
        const Vector<C> e = power < -ExpTable<C>::limit ? Vector<C>{} : exp_of<C>(power);
        store(x + j, e);
        sum += e;
    }
    C total = sum_of<C>(sum);
    for (; j < count; ++j) total += x[j] = exponential(x[j] - shift);
    return total;
}

}  // namespace hstu::similarity::cpu::HSTU_CPU_VARIANT
