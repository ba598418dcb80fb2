// Finds the compiled cell that serves a call.
#pragma once

#include "attention/dispatch.h"

namespace hstu::attention {

// The head dimension that kernels are compiled for: the smallest of 32, 64, 128 and 256 that holds this one.
constexpr int head_dim_bucket(int64_t head_dim) {
    return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

enum class Direction : int { kForward, kBackward };

// The cell for this call on a device of this compute capability (80 for 8.0); MissingKernelError where none was built.
const Cell& find_cell(Direction direction, int compute_capability, DType dtype, int head_dim, MaskKind mask,
                      BiasKind bias);

}  // namespace hstu::attention
