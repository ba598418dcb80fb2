// HSTU attention as Python calls it: checked tensors in, a kernel launch (or a CPU run) out.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/execution.h"
#include "common/tensor.h"

namespace hstu::attention {

// What forward and backward share. An undefined tensor was None.
struct Inputs {
    Tensor q, k, v;                     // [total_q, heads, dqk] [total_k, heads, dqk] [total_k, heads, dv]
    Tensor cu_seqlens_q, cu_seqlens_k;  // [batch + 1]
    int64_t max_seqlen_q, max_seqlen_k;
    Tensor num_contexts, num_targets;  // [batch] or undefined
    int64_t target_group_size;
    int64_t window_left, window_right;
    double alpha;
    Tensor rab;             // [batch, 1 or heads, M, M] or undefined
    Tensor position_table;  // [2 * max_len - 1] or [heads, 2 * max_len - 1], or undefined
    Tensor time_table;      // [num_buckets + 1] or [heads, num_buckets + 1], or undefined
    Tensor func;            // [1 or heads, n, >= total_q] or undefined
    int64_t scaling_seqlen;
    Tensor seqused_q, seqused_k;    // [batch] or undefined
    Tensor query_times, key_times;  // int64 [total_q], [total_k]; given with time_table
};

struct Gradients {
    Tensor dout;              // [total_q, heads, dv], read
    Tensor dq, dk, dv;        // as q, k, v, written
    Tensor drab;              // [batch, heads, M, M], zeroed by the caller, or undefined
    Tensor dposition, dtime;  // as the tables, zeroed by the caller, or undefined
    Tensor dq_accum;          // fp32 [backward_scratch()] or undefined
    Tensor table_accum;       // int64 [table_scratch()], zeroed by the caller; for the backward on a GPU
};

// A GPU tensor whose rows are not 16-byte aligned. The caller may try again with fresh copies.
struct MisalignedError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

void forward(const Inputs& inputs, const Tensor& out, Execution execution);
void backward(const Inputs& inputs, const Gradients& gradients, bool deterministic, Execution execution);

// fp32 elements that backward wants in dq_accum, whichever family serves it; 0 for none.
int64_t backward_scratch(const Tensor& q, const Tensor& v, const Tensor& cu_seqlens_q, int64_t max_seqlen_k,
                         bool deterministic);

// Zeroed int64 elements that the backward on a GPU wants in table_accum; 0 for none.
int64_t table_scratch(const Tensor& dposition, const Tensor& dtime);

}  // namespace hstu::attention
