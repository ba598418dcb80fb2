// HSTU attention on the CPU: every mask, rab and its gradient, float32, float64, float16 and bfloat16.
// Results do not depend on the number of threads, bit for bit.
#pragma once

#include <string>
#include <vector>

#include "attention/mask.h"
#include "attention/params.h"
#include "common/dtype.h"

namespace hstu::attention::cpu {

// Writes every row of out; rows that no sequence uses become 0.
void forward(const Params& params, DType dtype, MaskKind mask);

// Writes every row of dq, dk and dv, and drab inside the sequences when params.drab.data is set.
void backward(const BackwardParams& params, DType dtype, MaskKind mask);

// The instruction sets compiled in, and the one in use: the best that this machine has, or what the environment
// variable HSTU_EXT_CPU names (std::invalid_argument if it is not built in or the machine lacks it).
std::vector<std::string> built_variants();
const char* selected_variant();

}  // namespace hstu::attention::cpu
