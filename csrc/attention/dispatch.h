// From a call to the compiled cell that serves it. The table itself is generated (tools/codegen).
#pragma once

#include <string>
#include <vector>

#include "attention/bias.h"
#include "attention/mask.h"
#include "attention/params.h"
#include "common/dtype.h"

namespace hstu::attention {

enum class Arch : int { kSm80, kSm90 };

using ForwardFn = void (*)(const Params&, void* stream);
using BackwardFn = void (*)(const BackwardParams&, void* stream);

// One compiled kernel family: a row of the manifest.
struct Cell {
    const char* name;  // attn_fwd_sm80_bf16_d64_window, attn_bwd_sm80_fp16_d128_target_rab, ...
    Arch arch;
    DType dtype;
    int head_dim;  // bucket: 32, 64, 128 or 256
    MaskKind mask;
    BiasKind bias;
    ForwardFn forward;    // nullptr in a backward cell
    BackwardFn backward;  // nullptr in a forward cell
};

// Generated: every attention cell of this build, in manifest order.
const std::vector<Cell>& cells();

}  // namespace hstu::attention
