// The in-batch softmax on the GPU: what happens between the matrix products (similarity/api.h).
#pragma once

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

// Rows of fp32 dot products are merged into maximum, sum and positive_logit.
void in_batch_softmax_forward(const InBatchParams& p, int device, void* stream);
// Rows of fp32 dot products become the gradient of their similarities in `dtype`, each in the front of its own row.
void in_batch_softmax_backward(const InBatchParams& p, DType dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
