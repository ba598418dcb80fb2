// out = x / n with n = max(|x|, eps), and dx = (dout - out (out . dout)) / n; below eps only dx = dout / eps.
#pragma once

#include "similarity/cpu/rows.h"

namespace hstu::similarity::cpu::HSTU_CPU_VARIANT {

template <class T>
static void l2norm_rows(const L2NormParams& p, int64_t begin, int64_t end, void* memory) {
    using C = Compute<T>;
    C* const buffer = Scratch(memory).take<C>(p.dim);
    for (int64_t row = begin; row < end; ++row) {
        const C* x = as_compute(row_of<const T>(p.x, row), p.dim, buffer);
        const Norm<C> norm(dot(x, x, p.dim), p.eps);
        store_scaled(x, norm.inverse, p.dim, row_of<T>(p.out, row));
    }
}

template <class T>
static void l2norm_backward_rows(const L2NormParams& p, int64_t begin, int64_t end, void* memory) {
    using C = Compute<T>;
    Scratch scratch(memory);
    C* const x_buffer = scratch.take<C>(p.dim);
    C* const dout_buffer = scratch.take<C>(p.dim);
    for (int64_t row = begin; row < end; ++row) {
        const C* x = as_compute(row_of<const T>(p.x, row), p.dim, x_buffer);
        const C* dout = as_compute(row_of<const T>(p.dout, row), p.dim, dout_buffer);
        C product, square;
        dot_and_square(dout, x, p.dim, product, square);
        const Norm<C> norm(square, p.eps);
        const C along = norm.clamped ? C(0) : -product * norm.inverse * norm.inverse * norm.inverse;
        store_sum(dout, norm.inverse, x, along, p.dim, row_of<T>(p.out, row));
    }
}

}  // namespace hstu::similarity::cpu::HSTU_CPU_VARIANT
