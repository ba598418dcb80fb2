// The last step of the tables' gradients.
#pragma once

#include "attention/table_gradients.h"
#include "common/cuda_launch.h"

namespace hstu::attention {

// The tables' gradients from what the blocks have added up.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) hstu_finish_tables(const __grid_constant__ BackwardParams p) {
    const int64_t positions = TableGradients::position_entries(p);
    const int64_t entries = positions + TableGradients::time_entries(p);
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= entries) return;
    float sum = 0.0f;
    if (p.deterministic) {
        sum = exact_sum(p.table_accum + i * kExactWords);
    } else {
        for (int copy = 0; copy < kTableCopies; ++copy)
            sum += reinterpret_cast<const float*>(p.table_accum)[copy * entries + i];
    }
    (i < positions ? static_cast<float*>(p.dposition) + i : static_cast<float*>(p.dtime) + (i - positions))[0] = sum;
}

template <int kThreads = 128>
void finish_tables(const BackwardParams& p, cudaStream_t stream) {
    if (p.table_accum == nullptr) return;
    const int64_t entries = TableGradients::position_entries(p) + TableGradients::time_entries(p);
    launch<hstu_finish_tables<kThreads>>(ceil_div<int64_t>(entries, kThreads), kThreads, 0, p.device, stream, p);
}

}  // namespace hstu::attention
