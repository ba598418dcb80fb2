// The sampled softmax loss and its gradients on a GPU, for float32, float16 and bfloat16. `stream` is a cudaStream_t.
#pragma once

#include <cstddef>

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

// Writes loss, dquery and dsimilarity.
void sampled_softmax_forward(const SampledForwardParams& params, DType dtype, int device, void* stream);

// Two buffers each, [T * (K + 1)], of which a sort uses both.
struct SampledSort {
    uint32_t* items[2];  // of every pair
    uint32_t* order[2];  // t * (K + 1) + j
    void* scratch;       // sampled_softmax_sort_bytes
    size_t scratch_bytes;
};
size_t sampled_softmax_sort_bytes(int64_t pairs, int64_t items);
// Sorts all pairs by item, an item's in ascending order; returns which of the buffers have them.
int sampled_softmax_sort(const SampledParams& params, const SampledSort& sort, int device, void* stream);
// Writes dtable.
void sampled_softmax_table(const SampledTableParams& params, DType dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
