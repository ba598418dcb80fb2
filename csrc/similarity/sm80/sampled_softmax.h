// The sampled softmax loss and its gradients on a GPU, for float32, float16 and bfloat16. `stream` is a cudaStream_t.
#pragma once

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

// Writes loss, dquery and dsimilarity.
void sampled_softmax_forward(const SampledForwardParams& params, DType dtype, int device, void* stream);
// Writes the item of every pair t * (K + 1) + j, which is what pairs are sorted by.
void sampled_softmax_items(const SampledParams& params, int32_t* items, int device, void* stream);
// Writes dtable.
void sampled_softmax_table(const SampledTableParams& params, DType dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
