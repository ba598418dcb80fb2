#pragma once

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

void l2norm(const L2NormParams& p, DType dtype, int device, void* stream);
void l2norm_backward(const L2NormParams& p, DType dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
