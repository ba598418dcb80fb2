// The kernels of one variant, for every element type. Included by kernels_<variant>.cpp, which names the variant.
// As in attention/cpu/kernel_set.h everything is static or in the variant's namespace, and no standard container is used.
#pragma once

#include "similarity/cpu/in_batch_softmax.h"
#include "similarity/cpu/kernels.h"
#include "similarity/cpu/l2norm.h"
#include "similarity/cpu/sampled_softmax.h"

namespace hstu::similarity::cpu::HSTU_CPU_VARIANT {

template <class T>
struct TypeTag {
    using Type = T;
};

// body(TypeTag<element type>)
template <class Body>
static void with_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat64: return body(TypeTag<double>{});
        case DType::kFloat16: return body(TypeTag<Half>{});
        case DType::kBFloat16: return body(TypeTag<BFloat16>{});
        default: return body(TypeTag<float>{});
    }
}

static void l2norm(const L2NormParams& p, DType dtype, int64_t begin, int64_t end, void* scratch) {
    with_type(dtype, [&](auto type) { l2norm_rows<typename decltype(type)::Type>(p, begin, end, scratch); });
}

static void l2norm_backward(const L2NormParams& p, DType dtype, int64_t begin, int64_t end, void* scratch) {
    with_type(dtype, [&](auto type) { l2norm_backward_rows<typename decltype(type)::Type>(p, begin, end, scratch); });
}

template <class C>
static int64_t first_above(const C* scores, int64_t begin, int64_t end, C threshold) {
    constexpr int lanes = kLanes<C>, step = 4 * lanes;
    for (; begin + step <= end; begin += step) {
        const C* x = scores + begin;
        const BitVector<C> above = (load(x) > threshold) | (load(x + lanes) > threshold) |
                                   (load(x + 2 * lanes) > threshold) | (load(x + 3 * lanes) > threshold);
        uint64_t words[sizeof(above) / 8], any = 0;
        std::memcpy(words, &above, sizeof(above));
        for (uint64_t word : words) any |= word;
        if (any != 0) break;
    }
    while (begin < end && !(scores[begin] > threshold)) ++begin;
    return begin;
}

static void sampled_forward(const SampledParams& p, DType dtype, int64_t begin, int64_t end, void* scratch) {
    with_type(dtype, [&](auto type) {
        for (int64_t t = begin; t < end; ++t) sampled_forward_row<typename decltype(type)::Type>(p, t, scratch);
    });
}

static void sampled_backward_query(const SampledBackwardParams& p, DType dtype, int64_t begin, int64_t end,
                                   void* scratch) {
    with_type(dtype, [&](auto type) {
        for (int64_t t = begin; t < end; ++t) sampled_backward_query_row<typename decltype(type)::Type>(p, t, scratch);
    });
}

static void sampled_backward_table(const SampledBackwardParams& p, DType dtype, int64_t begin, int64_t end,
                                   void* scratch) {
    with_type(dtype, [&](auto type) {
        for (int64_t i = begin; i < end; ++i) sampled_backward_table_row<typename decltype(type)::Type>(p, i, scratch);
    });
}

static void in_batch_forward(const InBatchParams& p, int64_t row, void* scratch) {
    p.is_double ? in_batch_forward_row<double>(p, row, scratch) : in_batch_forward_row<float>(p, row, scratch);
}

static void in_batch_backward(const InBatchParams& p, int64_t row, void* scratch) {
    p.is_double ? in_batch_backward_row<double>(p, row, scratch) : in_batch_backward_row<float>(p, row, scratch);
}

#define HSTU_CPU_STRING_OF(name) #name
#define HSTU_CPU_STRING(name) HSTU_CPU_STRING_OF(name)

static constexpr Kernels kKernels = {HSTU_CPU_STRING(HSTU_CPU_VARIANT),
                                     l2norm,
                                     l2norm_backward,
                                     first_above<float>,
                                     first_above<double>,
                                     sampled_forward,
                                     sampled_backward_query,
                                     sampled_backward_table,
                                     in_batch_forward,
                                     in_batch_backward};

}  // namespace hstu::similarity::cpu::HSTU_CPU_VARIANT
