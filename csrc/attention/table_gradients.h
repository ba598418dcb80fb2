// Where kernels add up the gradients of the tables of the relative bias.
#pragma once

#include "attention/exact_sum.h"

namespace hstu::attention {

// The sums of one head: in one of kTableCopies copies, since atomics to the same few addresses wait for one another, or
// where deterministic in the exact sums. finish_tables() adds them up.
struct TableGradients {
    float *position = nullptr, *time = nullptr;  // at distance 0 and bucket 0; nullptr where not wanted
    int64_t *exact_position = nullptr, *exact_time = nullptr;
    float scale;

    __device__ TableGradients(const BackwardParams& p, int head, int copy) : scale(p.inv_scaling) {
        const int64_t positions = position_entries(p), times = time_entries(p);
        const int64_t of_position = head * p.dposition_head_stride + p.relative.reach;
        const int64_t of_time = positions + head * p.dtime_head_stride;
        float* const copies = reinterpret_cast<float*>(p.table_accum) + copy * (positions + times);
        if (p.dposition != nullptr) position = copies + of_position;
        if (p.dtime != nullptr) time = copies + of_time;
        if (p.deterministic) {
            exact_position = p.table_accum + of_position * kExactWords;
            exact_time = p.table_accum + of_time * kExactWords;
        }
    }

    HSTU_HOST_DEVICE static int64_t position_entries(const BackwardParams& p) {
        if (p.dposition == nullptr) return 0;
        return (2 * int64_t{p.relative.reach} + 1) * (p.dposition_head_stride ? p.heads : 1);
    }
    HSTU_HOST_DEVICE static int64_t time_entries(const BackwardParams& p) {
        if (p.dtime == nullptr) return 0;
        return (int64_t{p.relative.num_buckets} + 1) * (p.dtime_head_stride ? p.heads : 1);
    }

    __device__ __forceinline__ void add(float* table, int64_t* exact, int index, float x) const {
        if (x == 0.0f) return;
        if (exact_position != nullptr)
            add_exactly(exact + int64_t{index} * kExactWords, scale * x);
        else
            atomicAdd(table + index, scale * x);
    }
};

}  // namespace hstu::attention
