// What one compiled variant of the CPU kernels offers; kernel_set.h is compiled once per instruction set, each time in a
// namespace of its own. similarity.cpp owns the memory, the threads and everything that does not need vectors.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::cpu {

struct Kernels {
    const char* name;

    void (*l2norm)(const L2NormParams&, DType, int64_t begin, int64_t end, void* scratch);
    void (*l2norm_backward)(const L2NormParams&, DType, int64_t begin, int64_t end, void* scratch);

    // The first j in [begin, end) with scores[j] > threshold, or end.
    int64_t (*first_above_float)(const float* scores, int64_t begin, int64_t end, float threshold);
    int64_t (*first_above_double)(const double* scores, int64_t begin, int64_t end, double threshold);

    // Rows [begin, end) of loss, lse and similarity.
    void (*sampled_forward)(const SampledParams&, DType, int64_t begin, int64_t end, void* scratch);
    // Rows [begin, end) of weight, unit_query and dquery.
    void (*sampled_backward_query)(const SampledBackwardParams&, DType, int64_t begin, int64_t end, void* scratch);
    // Rows [begin, end) of dtable.
    void (*sampled_backward_table)(const SampledBackwardParams&, DType, int64_t begin, int64_t end, void* scratch);

    void (*in_batch_forward)(const InBatchParams&, int64_t row, void* scratch);
    void (*in_batch_backward)(const InBatchParams&, int64_t row, void* scratch);
};

// Bytes of scratch, 64-byte aligned, that a call needs for rows of `dim` and `logits` logits.
constexpr int64_t scratch_bytes(int64_t dim, int64_t logits) { return (4 * dim + logits) * 8 + 5 * 64; }

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace hstu::similarity::cpu
