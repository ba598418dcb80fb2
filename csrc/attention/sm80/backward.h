// HSTU attention backward: which kernels run for one call.
#pragma once

#include "attention/sm80/backward_kv.h"
#include "attention/sm80/backward_q.h"

namespace hstu::attention::sm80 {

template <class T, int kHeadDim, class Mask, class Bias, class Config = BackwardTile<kHeadDim>,
          class QueryConfig = BackwardQueryTile<kHeadDim>>
void run_backward(const BackwardParams& p, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int64_t sequences = int64_t{p.heads} * p.batch;
    const DqPlan plan = plan_of<Config>(p);
    if (plan == DqPlan::kReduce)
        check_cuda(cudaMemsetAsync(p.dq_accum, 0, sizeof(float) * dq_accum_elements<Config>(p, kHeadDim), stream),
                   "clearing the dQ scratch");
    launch<backward_kv_kernel<T, kHeadDim, Mask, Bias, Config>>(block_count(p.max_seqlen_k, Config::cols) * sequences,
                                                              Config::warps * 32, BackwardShared<kHeadDim, Config>::kBytes,
                                                              p.device, stream, p, plan);
    if (plan == DqPlan::kReduce)
        launch<backward_dq_convert_kernel<T, kHeadDim, Config>>(block_count(p.max_seqlen_q, Config::rows) * sequences,
                                                              Config::warps * 32, 0, p.device, stream, p);
    if (plan == DqPlan::kSeparate)
        launch<backward_q_kernel<T, kHeadDim, Mask, Bias, QueryConfig>>(
            block_count(p.max_seqlen_q, QueryConfig::rows) * sequences, QueryConfig::warps * 32,
            BackwardQueryShared<kHeadDim, QueryConfig>::kBytes, p.device, stream, p);
}

}  // namespace hstu::attention::sm80
