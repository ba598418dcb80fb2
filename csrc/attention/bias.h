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

// rab[b, h, p, j] with p the position of query row i; zero outside the sequence and the tensor.
template <class T>
struct RabBias {
    static constexpr BiasKind kKind = BiasKind::kRab;

    const T* data;  // [size, size] of this batch and head
    int64_t row_stride;
    int offset, len_q, len_k;  // cut to the tensor

    HSTU_HOST_DEVICE RabBias(const Params& p, const Sequence& s, int b, int h)
        : data(p.rab.at<T>(b, h, 0)), row_stride(p.rab.row_stride), offset(s.len_k - s.len_q),
          len_q(static_cast<int>(min_of<int64_t>(s.len_q, p.rab.size - offset))),
          len_k(static_cast<int>(min_of<int64_t>(s.len_k, p.rab.size))) {}

    HSTU_HOST_DEVICE bool contains(int i, int j) const { return i + offset >= 0 && i < len_q && j < len_k; }
    HSTU_HOST_DEVICE T at(int i, int j) const {
        return contains(i, j) ? data[int64_t{i + offset} * row_stride + j] : T(0);
    }
};

}  // namespace hstu::attention
