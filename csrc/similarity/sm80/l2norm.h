// l2norm and its gradient on a GPU, for float32, float16 and bfloat16. `stream` is a cudaStream_t.
#pragma once

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

void l2norm(const L2NormParams& params, DType dtype, int device, void* stream);
// dout is of dtype or float32.
void l2norm_backward(const L2NormParams& params, DType dtype, DType dout_dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
