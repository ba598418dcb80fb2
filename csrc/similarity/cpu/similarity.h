// The similarity kernels on the CPU, for float32, float64, float16 and bfloat16, with sums in the compute type.
// Results do not depend on the number of threads, bit for bit.
#pragma once

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::cpu {

void l2norm(const L2NormParams& params, DType dtype);
void l2norm_backward(const L2NormParams& params, DType dtype);

// Bytes of one element of TopkParams::kept.
constexpr int64_t kCandidateBytes = 16;
void topk_merge(const TopkParams& params);   // one tile of scores into `kept`
void topk_finish(const TopkParams& params);  // values and indices out of `kept`

void sampled_softmax_forward(const SampledParams& params, DType dtype);
// Fills starts and order: every place of every item, by item.
void sampled_softmax_group(const SampledParams& params, int64_t* starts, int64_t* order);
void sampled_softmax_backward_query(const SampledBackwardParams& params, DType dtype);
void sampled_softmax_backward_table(const SampledBackwardParams& params, DType dtype);

void in_batch_softmax_forward(const InBatchParams& params);
void in_batch_softmax_backward(const InBatchParams& params);

}  // namespace hstu::similarity::cpu
