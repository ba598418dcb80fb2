// The gated layer norm of rows, with D = heads * dim columns:
//
//   n_c = (x_c - mean) / sqrt(variance + eps),   out_c = gate_c n_c
//   dgate_c = dout_c n_c,   g_c = dout_c gate_c,   dx_c = (g_c - mean(g) - n_c mean(g n)) / sqrt(variance + eps)
//
// A warp has a row, and a lane every 32nd vector of kWidth columns of it. A row goes by several times, mean, variance,
// result; it is read from memory once and then from the L1 cache, so that a row may have any length. The forward leaves
// the mean and the factor for the backward. Column c of the result lies in part c / dim of x, whose parts are `width`
// apart or more; dx is 0 in the columns of a part that do not count. Sums are in fp32. No warp needs another.
#include "common/cuda_launch.h"
#include "norm/norm.h"
#include "similarity/sm80/rows.h"

namespace hstu::norm {
namespace {

using similarity::sm80::load;
using similarity::sm80::store;
using similarity::sm80::sum_over;

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// The place in a row of x of a column of the result; kWidth > 1 only where a row is one piece.
template <int kWidth>
__device__ __forceinline__ int64_t place(const Params& p, const Parts& x, int column) {
    if constexpr (kWidth > 1) return column;
    const int head = column / p.dim;
    return head * x.head_stride + (column - head * p.dim);
}

template <class T>
__device__ __forceinline__ T* row_of(const Parts& x, int64_t row) {
    return static_cast<T*>(x.data) + row * x.row_stride;
}
template <class T>
__device__ __forceinline__ T* row_of(const Rows& x, int64_t row) {
    return static_cast<T*>(x.data) + row * x.stride;
}

// body(column) for this lane's vectors of a row.
template <int kWidth, class Body>
__device__ __forceinline__ void for_columns(int columns, const Body& body) {
    for (int column = threadIdx.x % 32 * kWidth; column < columns; column += 32 * kWidth) body(column);
}

template <class X, class Y, int kWidth>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Params p) {
    const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
    if (row >= p.rows) return;
    const int columns = p.heads * p.dim;
    const X* const x = row_of<const X>(p.x, row);
    float values[kWidth], sum = 0, square = 0;
    for_columns<kWidth>(columns, [&](int column) {
        load<kWidth>(x + place<kWidth>(p, p.x, column), values);
#pragma unroll
        for (const float value : values) sum += value;
    });
    const float mean = sum_over<32>(sum) / columns;
    for_columns<kWidth>(columns, [&](int column) {
        load<kWidth>(x + place<kWidth>(p, p.x, column), values);
#pragma unroll
        for (const float value : values) square += (value - mean) * (value - mean);
    });
    const float factor = rsqrtf(sum_over<32>(square) / columns + p.eps);
    for_columns<kWidth>(columns, [&](int column) {
        load<kWidth>(x + place<kWidth>(p, p.x, column), values);
        float gate[kWidth];
        if (p.gate.data) load<kWidth>(row_of<const Y>(p.gate, row) + column, gate);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] = (values[k] - mean) * factor * (p.gate.data ? gate[k] : 1.0f);
        store<kWidth>(values, row_of<Y>(p.out, row) + column);
    });
    if (threadIdx.x % 32 == 0) p.statistics[2 * row] = mean, p.statistics[2 * row + 1] = factor;
}

template <class X, class Y, int kWidth>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(const Params p) {
    const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
    if (row >= p.rows) return;
    const int columns = p.heads * p.dim;
    const X* const x = row_of<const X>(p.x, row);
    const float mean = p.statistics[2 * row], factor = p.statistics[2 * row + 1];
    float n[kWidth], g[kWidth], dout[kWidth], sum = 0, product = 0;
    const auto read = [&](int column) {
        float gate[kWidth];
        load<kWidth>(x + place<kWidth>(p, p.x, column), n);
        load<kWidth>(row_of<const Y>(p.dout, row) + column, dout);
        if (p.gate.data) load<kWidth>(row_of<const Y>(p.gate, row) + column, gate);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            n[k] = (n[k] - mean) * factor;
            g[k] = dout[k] * (p.gate.data ? gate[k] : 1.0f);
        }
    };
    for_columns<kWidth>(columns, [&](int column) {
        read(column);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum += g[k], product += g[k] * n[k];
    });
    const float mean_g = sum_over<32>(sum) / columns, mean_gn = sum_over<32>(product) / columns;
    X* const dx = row_of<X>(p.dx, row);
    for_columns<kWidth>(columns, [&](int column) {
        read(column);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            g[k] = (g[k] - mean_g - n[k] * mean_gn) * factor;
            dout[k] *= n[k];
        }
        store<kWidth>(g, dx + place<kWidth>(p, p.dx, column));
        if (p.gate.data) store<kWidth>(dout, row_of<Y>(p.dgate, row) + column);
    });
    const int idle = p.width - p.dim;
    if (idle > 0)
        for_columns<1>(p.heads * idle, [&](int i) {
            const float zero = 0;
            store<1>(&zero, dx + i / idle * p.dx.head_stride + p.dim + i % idle);
        });
}

bool are_vectors(const void* data, int64_t stride, int width, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % (width * bytes) == 0 && stride % width == 0;
}

template <bool kBackward, class X, class Y>
void launch_types(const Params& p, int device, void* stream) {
    // Vectors of 16 bytes in the wider type, where a row of x is one piece.
    constexpr int kWide = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
    const auto in_one_piece = [&](const Parts& x) {
        return (p.heads == 1 || (p.dim == p.width && x.head_stride == p.width)) &&
               are_vectors(x.data, x.row_stride, kWide, sizeof(X));
    };
    const auto fits = [&](const Rows& y) { return are_vectors(y.data, y.stride, kWide, sizeof(Y)); };
    const bool wide = p.heads * p.dim % kWide == 0 && in_one_piece(p.x) && (!kBackward || in_one_piece(p.dx)) &&
                      fits(p.gate) && fits(p.out) && fits(p.dgate);
    const auto run = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        constexpr auto kKernel = kBackward ? &norm_backward_kernel<X, Y, kWidth> : &norm_kernel<X, Y, kWidth>;
        launch<kKernel>((p.rows + kWarps - 1) / kWarps, kThreads, 0, device, static_cast<cudaStream_t>(stream), p);
    };
    if (wide)
        run(std::integral_constant<int, kWide>{});
    else
        run(std::integral_constant<int, 1>{});
}

template <bool kBackward>
void launch_norm(const Params& p, DType x_type, DType out_type, int device, void* stream) {
    similarity::sm80::with_element_type(x_type, [&](auto x) {
        similarity::sm80::with_element_type(
            out_type, [&](auto y) { launch_types<kBackward, decltype(x), decltype(y)>(p, device, stream); });
    });
}

}  // namespace

void launch_forward(const Params& p, DType x_type, DType out_type, int device, void* stream) {
    launch_norm<false>(p, x_type, out_type, device, stream);
}

void launch_backward(const Params& p, DType x_type, DType out_type, int device, void* stream) {
    launch_norm<true>(p, x_type, out_type, device, stream);
}

}  // namespace hstu::norm
