// HSTU attention backward: one launch of key-stationary blocks (dK, dV) and, when dQ has its own pass, query-stationary
// blocks (dQ) behind them, so that the second kind fills the first kind's tail.
#pragma once

#include "attention/sm80/backward_kv.h"
#include "attention/sm80/backward_q.h"

namespace hstu::attention::sm80 {

template <class T, int kHeadDim, class Mask, class Bias, class Config>
__global__ void __launch_bounds__(Config::warps * 32, Config::blocks)
    backward_kernel(const __grid_constant__ BackwardParams p, DqPlan plan, int kv_blocks) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    const int block = static_cast<int>(blockIdx.x);
    if (block < kv_blocks) backward_kv_block<T, kHeadDim, Mask, Bias, Config>(p, plan, block, shared);
    else backward_q_block<T, kHeadDim, Mask, Bias, Config>(p, block - kv_blocks, shared);
}

template <class T, int kHeadDim, class Mask, class Bias, class Config = BackwardTile<kHeadDim>>
void run_backward(const BackwardParams& p, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int64_t sequences = int64_t{p.heads} * p.batch;
    const DqPlan plan = plan_of<Config>(p);
    const int64_t kv_blocks = block_count(p.max_seqlen_k, Config::cols) * sequences;
    const int64_t q_blocks = plan == DqPlan::kSeparate ? block_count(p.max_seqlen_q, Config::q_rows) * sequences : 0;
    constexpr int kShared = max_of(BackwardShared<kHeadDim, Config>::kBytes, BackwardQueryShared<kHeadDim, Config>::kBytes);

    if (plan == DqPlan::kReduce)
        check_cuda(cudaMemsetAsync(p.dq_accum, 0, sizeof(float) * dq_accum_elements<Config>(p, kHeadDim), stream),
                   "clearing the dQ scratch");
    launch<backward_kernel<T, kHeadDim, Mask, Bias, Config>>(kv_blocks + q_blocks, Config::warps * 32, kShared, p.device,
                                                             stream, p, plan, static_cast<int>(kv_blocks));
    if (plan == DqPlan::kReduce)
        launch<backward_dq_convert_kernel<T, kHeadDim, Config>>(block_count(p.max_seqlen_q, Config::rows) * sequences,
                                                                Config::warps * 32, 0, p.device, stream, p);
}

}  // namespace hstu::attention::sm80
