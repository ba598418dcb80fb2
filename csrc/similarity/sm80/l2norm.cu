// out = x / n with n = max(|x|, eps), and dx = (dout - out (out . dout)) / n; below eps only dx = dout / eps.
//
// A row belongs to a group of kLanes threads: 8, a warp or a block, by the number of its vectors. A thread takes every
// kLanes-th vector of the row and keeps the first kCached of them in registers, all their loads under way at once; it
// reads the rest of a longer row a second time, from the cache. Sums go over the group by shuffles, over a block by way
// of shared memory too, in an order that the row's length alone decides. Nothing is shared between groups.
#include "similarity/sm80/l2norm.h"

#include <type_traits>

#include "common/cuda_launch.h"
#include "similarity/sm80/rows.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kCached = 4;

// Every thread of the block calls it.
template <int kLanes>
__device__ __forceinline__ float sum_over_group(float x) {
    if constexpr (kLanes <= 32) {
        return sum_over<kLanes>(x);
    } else {
        static_assert(kLanes == kThreads, "a group of several warps is the block");
        __shared__ float sums[kWarps];
        x = sum_over<32>(x);
        __syncthreads();  // the sums of the call before have been read
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
        __syncthreads();
        x = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) x += sums[warp];
        return x;
    }
}

// A thread's place: its row, the part of it that is kept in registers, and the columns after that part.
template <class T, int kWidth, int kLanes>
struct Place {
    using Group = RowGroup<T, kWidth, kLanes, kCached>;

    int64_t row, dim, rest;
    bool inside;  // a group past the last row repeats it and writes nothing
    Group group;

    __device__ __forceinline__ explicit Place(const L2NormParams& p) {
        constexpr int64_t kColumns = int64_t{kCached} * kLanes * kWidth;
        const int lane = threadIdx.x % kLanes;
        row = blockIdx.x * int64_t{kThreads / kLanes} + threadIdx.x / kLanes;
        inside = row < p.rows;
        row = min_of(row, p.rows - 1);
        dim = p.dim;
        rest = kColumns + lane * kWidth;
        group = {static_cast<int>(min_of(dim, kColumns)), lane};
    }

    // body(column) for every vector that is not in registers.
    template <class Body>
    __device__ __forceinline__ void for_rest(const Body& body) const {
        for (int64_t d = rest; d < dim; d += kLanes * kWidth) body(d);
    }
};

template <class T, int kWidth, int kLanes>
__global__ void __launch_bounds__(kThreads) l2norm_kernel(const L2NormParams p, float inverse_eps) {
    const Place<T, kWidth, kLanes> place(p);
    const T* const from = row_of<const T>(p.x, place.row);
    T* const to = row_of<T>(p.out, place.row);

    typename decltype(place.group)::Row x;
    place.group.load(from, x);
    float square = dot(x, x);
    place.for_rest([&](int64_t d) {
        float more[kWidth];
        load<kWidth>(from + d, more);
        square += dot(more, more);
    });
    const float inverse = Norm(sum_over_group<kLanes>(square), inverse_eps).inverse;
    if (!place.inside) return;
#pragma unroll
    for (float& value : x) value *= inverse;
    place.group.store(x, to);
    place.for_rest([&](int64_t d) {
        float more[kWidth];
        load<kWidth>(from + d, more);
#pragma unroll
        for (float& value : more) value *= inverse;
        store<kWidth>(more, to + d);
    });
}

// D: of dout, T or float.
template <class T, class D, int kWidth, int kLanes>
__global__ void __launch_bounds__(kThreads) l2norm_backward_kernel(const L2NormParams p, float inverse_eps) {
    const Place<T, kWidth, kLanes> place(p);
    const T* const from = row_of<const T>(p.x, place.row);
    const D* const dout = row_of<const D>(p.dout, place.row);
    T* const to = row_of<T>(p.out, place.row);

    typename decltype(place.group)::Row x, dx;
    place.group.load(from, x);
    place.group.load(dout, dx);
    float square = dot(x, x), product = dot(x, dx);
    place.for_rest([&](int64_t d) {
        float more[kWidth], dmore[kWidth];
        load<kWidth>(from + d, more);
        load<kWidth>(dout + d, dmore);
        square += dot(more, more);
        product += dot(more, dmore);
    });
    const Norm norm(sum_over_group<kLanes>(square), inverse_eps);
    product = sum_over_group<kLanes>(product);
    if (!place.inside) return;
    const float along = norm.clamped ? 0.0f : -product * norm.inverse * norm.inverse * norm.inverse;
#pragma unroll
    for (int i = 0; i < place.group.kElements; ++i) dx[i] = dx[i] * norm.inverse + x[i] * along;
    place.group.store(dx, to);
    place.for_rest([&](int64_t d) {
        float more[kWidth], dmore[kWidth];
        load<kWidth>(from + d, more);
        load<kWidth>(dout + d, dmore);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dmore[i] = dmore[i] * norm.inverse + more[i] * along;
        store<kWidth>(dmore, to + d);
    });
}

// D: void in the forward.
template <class T, class D, int kWidth, int kLanes>
void launch_rows(const L2NormParams& p, int device, void* stream_handle) {
    const int64_t blocks = ceil_div<int64_t>(p.rows, kThreads / kLanes);
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const auto inverse_eps = static_cast<float>(1 / p.eps);
    if constexpr (std::is_void_v<D>)
        launch<&l2norm_kernel<T, kWidth, kLanes>>(blocks, kThreads, 0, device, stream, p, inverse_eps);
    else
        launch<&l2norm_backward_kernel<T, D, kWidth, kLanes>>(blocks, kThreads, 0, device, stream, p, inverse_eps);
}

template <class T, class D, int kWidth>
void launch_vectors(const L2NormParams& p, int device, void* stream) {
    const int64_t vectors = ceil_div<int64_t>(p.dim, kWidth);
    if (vectors <= 8 * kCached) return launch_rows<T, D, kWidth, 8>(p, device, stream);
    if (vectors <= 32 * kCached) return launch_rows<T, D, kWidth, 32>(p, device, stream);
    launch_rows<T, D, kWidth, kThreads>(p, device, stream);
}

template <class T, class D>
void launch_l2norm(const L2NormParams& p, int device, void* stream) {
    constexpr int kWidth = 16 / sizeof(T), kDoutBytes = sizeof(std::conditional_t<std::is_void_v<D>, T, D>);
    const bool vectors = has_vectors(p.x, p.dim, kWidth, sizeof(T)) && has_vectors(p.dout, p.dim, kWidth, kDoutBytes) &&
                         has_vectors(p.out, p.dim, kWidth, sizeof(T));
    vectors ? launch_vectors<T, D, kWidth>(p, device, stream) : launch_vectors<T, D, 1>(p, device, stream);
}

}  // namespace

void l2norm(const L2NormParams& p, DType dtype, int device, void* stream) {
    with_element_type(dtype, [&](auto zero) { launch_l2norm<decltype(zero), void>(p, device, stream); });
}

void l2norm_backward(const L2NormParams& p, DType dtype, DType dout_dtype, int device, void* stream) {
    with_element_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (dout_dtype == dtype) return launch_l2norm<T, T>(p, device, stream);
        if constexpr (!std::is_same_v<T, float>) launch_l2norm<T, float>(p, device, stream);
    });
}

}  // namespace hstu::similarity::sm80
