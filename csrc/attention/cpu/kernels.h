// What one compiled variant of the CPU kernels offers. kernel_set.h is compiled once per instruction set, each time in a
// namespace of its own; attention.cpp owns the memory, the threads and the order of the work.
#pragma once

#include <cstddef>

#include "attention/mask.h"
#include "attention/params.h"
#include "common/dtype.h"

namespace hstu::attention::cpu {

constexpr int kBlockQ = 64;  // query rows of a tile
constexpr int kBlockK = 64;  // keys of a tile

// The query blocks first, first + step, ... of one sequence and head.
struct QueryBlocks {
    int batch, head, first, step;
};

struct Kernels {
    const char* name;

    // Bytes of scratch, 64-byte aligned, that a call of forward (backward) needs.
    size_t (*forward_scratch)(const Params&, DType);
    size_t (*backward_scratch)(const Params&, DType);
    // Bytes of the dK and dV sums of one sequence and head.
    size_t (*partial_bytes)(const Params&, DType, int len_k);

    // Rows of out in query block `block`.
    void (*forward)(const Params&, DType, MaskKind, int batch, int head, int block, void* scratch);
    // Rows of dq (and drab) in the query blocks, and what these blocks add to dK and dV, into `partial`, and to the
    // tables of the relative bias, into `tables` (relative.h; nullptr: not wanted).
    void (*backward)(const BackwardParams&, DType, MaskKind, const QueryBlocks&, void* partial, void* tables,
                     void* scratch);
    // Rows [row0, row0 + rows) of dk and dv: the sum of `count` partials that lie one after the other, left in the first.
    void (*finish)(const BackwardParams&, DType, int batch, int head, void* partials, int count, int row0, int rows);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace hstu::attention::cpu
