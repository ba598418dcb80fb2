// HSTU attention backward: one launch of key-stationary blocks (dK, dV) and, when dQ has its own pass, query-stationary
// blocks (dQ) behind them, so that the second kind fills the first kind's tail.
#pragma once

#include "attention/finish_tables.h"
#include "attention/sm80/backward_kv.h"
#include "attention/sm80/backward_q.h"

namespace hstu::attention::sm80 {

struct BackwardBlocks {
    BlockOrder kv_order, q_order;
    int col_blocks, row_blocks;  // along a sequence
    int kv;                      // key-stationary blocks come first
};

template <class T, int kHeadDim, class Mask, class Bias, class Config>
__global__ void __launch_bounds__(Config::warps * 32, Config::blocks)
    backward_kernel(const __grid_constant__ BackwardParams p, DqPlan plan,
                    const __grid_constant__ BackwardBlocks blocks) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    const int block = static_cast<int>(blockIdx.x);
    if (block < blocks.kv)
        backward_kv_block<T, kHeadDim, Mask, Bias, Config>(p, plan, blocks.kv_order[block], blocks.col_blocks, shared);
    else
        backward_q_block<T, kHeadDim, Mask, Bias, Config>(p, blocks.q_order[block - blocks.kv], blocks.row_blocks,
                                                          shared);
}

template <int kHeadDim, class Config>
constexpr int kBackwardSharedBytes =
    max_of(BackwardShared<kHeadDim, Config>::kBytes, BackwardQueryShared<kHeadDim, Config>::kBytes);

template <class T, int kHeadDim, class Mask, class Bias, class Config>
void launch_backward(const BackwardParams& p, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const DqPlan plan = plan_of<Config>(p);
    const int col_blocks = block_count(p.max_seqlen_k, Config::cols);
    const int row_blocks = block_count(p.max_seqlen_q, Config::q_rows);
    const int dq_tiles = block_count(p.max_seqlen_q, Config::rows);
    const int64_t pairs = int64_t{p.heads} * p.batch, kv_blocks = col_blocks * pairs;
    const auto order = [&](int ranks) {
        return BlockOrder(p, ranks, Config::blocks * multiprocessors(p.device), l2_cache_bytes(p.device));
    };
    const int64_t q_blocks = plan == DqPlan::kSeparate ? row_blocks * pairs : 0;

    if (plan == DqPlan::kReduce)
        check_cuda(cudaMemsetAsync(p.dq_accum, 0, sizeof(float) * dq_accum_elements<Config>(p, kHeadDim), stream),
                   "clearing the dQ scratch");
    launch<backward_kernel<T, kHeadDim, Mask, Bias, Config>>(
        kv_blocks + q_blocks, Config::warps * 32, kBackwardSharedBytes<kHeadDim, Config>, p.device, stream, p, plan,
        BackwardBlocks{order(col_blocks), order(row_blocks), col_blocks, row_blocks, static_cast<int>(kv_blocks)});
    if (plan == DqPlan::kReduce)
        launch<backward_dq_convert_kernel<T, kHeadDim, Config>>(dq_tiles * pairs, Config::warps * 32, 0, p.device,
                                                                stream, p, order(dq_tiles), dq_tiles);
    if constexpr (Bias::kKind == BiasKind::kRelative) finish_tables(p, stream);
}

template <class T, int kHeadDim, class Mask, class Bias>
void run_backward(const BackwardParams& p, void* stream) {
    using Wide = BackwardTile<kHeadDim>;
    using Compact = CompactBackwardTile<kHeadDim>;
    if constexpr (kBackwardSharedBytes<kHeadDim, Wide> > kBackwardSharedBytes<kHeadDim, Compact>) {
        if (kBackwardSharedBytes<kHeadDim, Wide> > max_shared_bytes(p.device))
            return launch_backward<T, kHeadDim, Mask, Bias, Compact>(p, stream);
    }
    launch_backward<T, kHeadDim, Mask, Bias, Wide>(p, stream);
}

}  // namespace hstu::attention::sm80
