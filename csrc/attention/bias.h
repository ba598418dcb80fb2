// What is added to the scores: nothing, a dense tensor inside of alpha, or a relative bias outside of it. One type per
// kind, as for masks.
#pragma once

#include "attention/params.h"
#include "common/host_device.h"

namespace hstu::attention {

enum class BiasKind : int { kNone, kRab, kRelative };

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

// position[clip(p - j)] + time[bucket(|t_i - t_j|)] with p the position of query row i. T: the type of the tables.
template <class T>
struct RelativeBias {
    static constexpr BiasKind kKind = BiasKind::kRelative;

    const T* position;  // [2 * reach + 1], at distance 0; may be nullptr
    const T* time;      // [num_buckets + 1], may be nullptr
    int reach, num_buckets;
    const int64_t* query_times;  // of this sequence: [len_q] and [len_k]
    const int64_t* key_times;
    int offset, len_q, len_k;

    HSTU_HOST_DEVICE RelativeBias(const Params& p, const Sequence& s, int, int h)
        : RelativeBias(p, s.q_begin, s.k_begin, s.len_q, s.len_k, h) {}
    HSTU_HOST_DEVICE RelativeBias(const Params& p, int64_t q_begin, int64_t k_begin, int len_q, int len_k, int h)
        : position(p.relative.position ? static_cast<const T*>(p.relative.position) +
                                             h * p.relative.position_head_stride + p.relative.reach
                                       : nullptr),
          time(p.relative.time ? static_cast<const T*>(p.relative.time) + h * p.relative.time_head_stride : nullptr),
          reach(p.relative.reach), num_buckets(p.relative.num_buckets), query_times(p.relative.query_times + q_begin),
          key_times(p.relative.key_times + k_begin), offset(len_k - len_q), len_q(len_q), len_k(len_k) {}

    // Of query row i and key row j, clipped to the table.
    HSTU_HOST_DEVICE int distance(int i, int j) const { return clamp_to(i + offset - j, -reach, reach); }
};

}  // namespace hstu::attention
