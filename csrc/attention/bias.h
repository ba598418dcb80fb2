// What is added to q.k before alpha: nothing, or a dense tensor. One type per kind, as for masks.
#pragma once

#include "attention/params.h"
#include "common/host_device.h"

namespace hstu::attention {

enum class BiasKind : int { kNone, kRab };

struct NoBias {
    static constexpr BiasKind kKind = BiasKind::kNone;

    HSTU_HOST_DEVICE NoBias(const Params&, const Sequence&, int, int) {}
};

// rab[b, h, p, j] with p the position of query row i; zero outside the tensor.
template <class T>
struct RabBias {
    static constexpr BiasKind kKind = BiasKind::kRab;

    const T* data;  // [size, size] of this batch and head
    int64_t row_stride, size;
    int offset;

    HSTU_HOST_DEVICE RabBias(const Params& p, const Sequence& s, int b, int h)
        : data(p.rab.at<T>(b, h, 0)), row_stride(p.rab.row_stride), size(p.rab.size), offset(s.len_k - s.len_q) {}

    HSTU_HOST_DEVICE bool contains(int i, int j) const {
        return i + offset >= 0 && i + offset < size && j >= 0 && j < size;
    }
    // Index of element (i, j); also that of drab, which shares the layout up to strides.
    HSTU_HOST_DEVICE T at(int i, int j) const {
        return contains(i, j) ? data[(i + offset) * row_stride + j] : T(0);
    }
};

}  // namespace hstu::attention
