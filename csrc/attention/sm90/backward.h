// HSTU attention backward, wgmma + TMA (compute capability 9.0).
//
//   dV_j = sum_i P_ij dO_i      G_ij = keep(i, j) silu'(S_ij) / N (dO_i.v_j)
//   dK_j = alpha sum_i G_ij q_i     dQ_i = alpha sum_j G_ij k_j
//
// A block of threads stays and takes up one work after another: one head's `cols` keys of one sequence, whose K and V lie
// in shared memory while the query rows that keep any of them pass by, `rows` at a time. Seven roles:
//   loader (warp 0)       writes the work down, fetches K and V
//   a thread (warp 1)     fetches Q and dO tile by tile; with a relative bias a warp (backward_bias.h)
//   two threads           await this block's turns at tiles of dQ, and pass them on (warps 2 and 3, backward_q.h)
//   cleaner (warp 3)      writes 0 to the rows that no product reaches, in the end
//   a query warpgroup     dQ = G K of each tile, added up over the blocks in turn (backward_q.h)
//   two key warpgroups    own 64 keys each: S^T = K Q^T and dP^T = V dO^T become P^T and G^T in registers, which are the
//                         left operands of dV += P^T dO and dK += G^T Q; G^T is also written to shared memory
//                         (backward_kv.h; at head dimension 256 they share 64 keys: backward_kv_split.h)
// Nothing is cleared or converted by a pass of its own but the counters of the turns. The factors alpha / N and 1 / N
// are applied at the end.
// A relative bias is added by the key warpgroups, who also add up its gradients (backward_sums.h).
#pragma once

#include "attention/bias.h"
#include "attention/finish_tables.h"
#include "attention/sm90/backward_kv_split.h"
#include "attention/sm90/backward_q.h"
#include "attention/sm90/cluster_launch.h"
#include "attention/tile_config.h"

namespace hstu::attention::sm90 {

template <class T, int kHeadDim, class Mask, class Config>
__global__ void __launch_bounds__(4 * kWarpgroup, 1)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardMaps maps,
                    const __grid_constant__ Schedule schedule) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const BackwardShared<kHeadDim, Mask, Config> shared(shared_memory);
    const int warp = uniform_warp();
    if (threadIdx.x == 0) shared.init_barriers();
    if constexpr (Config::cluster > 1)
        sync_cluster();
    else
        __syncthreads();

    if (warp < 4) {
        lower_registers<Config::loader_registers>();
        if (warp == 0) load_works(p, maps, schedule, shared);
        if (warp == 1 && (Config::relative || lane() == 0)) load_queries(p, maps, shared);
        if (warp == 2 && lane() == 0) await_turns(p, shared);
        if (warp == 3) {
            if (lane() == 0) pass_turns(p, shared);
            __syncwarp();
            clean_works<T, Mask, Config>(p, schedule.levels);
        }
    } else if (warp < 8) {
        lower_registers<Config::query_registers>();
        add_up_queries<T>(p, shared);
    } else {
        raise_registers<Config::key_registers>();
        if constexpr (Config::split) {
            if (warp < 12)
                own_values<T>(p, shared);
            else
                own_gradients<T>(p, shared);
        } else {
            own_keys<T>(p, shared, warp / 4 - 2);
        }
    }
    if constexpr (Config::cluster > 1) sync_cluster();  // shared memory is the other block's too
}

template <class T, int kHeadDim, class Mask, class Config>
void launch_backward(const BackwardParams& p, void* stream_handle) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    constexpr int kPanel = Shared::QTile::kPanelCols, kPanels = Shared::QTile::kPanels;
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    if (max_of(p.total_q, p.total_k) > 0x7fffffff) throw std::runtime_error("hstu_ext: more than 2^31 - 1 packed rows");
    constexpr auto kKernel = backward_kernel<T, kHeadDim, Mask, Config>;
    ClusterLaunch launch{Config::cluster, false, 4 * kWarpgroup, Shared::kBytes, p.device, stream};
    const int clusters = launch.template fitting<kKernel>();
    const Schedule schedule(p, Shared::kClusterCols, clusters, true);
    if (schedule.places() > 0x3fffffff)
        throw std::runtime_error("hstu_ext: too many blocks of keys: " + std::to_string(schedule.places()));
    const BackwardMaps maps{
        SequenceMap::make<T>(p.q, p.total_q, p.heads, p.dim_qk, p.max_seqlen_q, Config::rows, kPanel, kPanels),
        SequenceMap::make<T>(p.dout, p.total_q, p.heads, p.dim_v, p.max_seqlen_q, Config::rows, kPanel, kPanels),
        SequenceMap::make<T>(p.k, p.total_k, p.heads, p.dim_qk, p.max_seqlen_k, Config::cols, kPanel, kPanels),
        SequenceMap::make<T>(p.v, p.total_k, p.heads, p.dim_v, p.max_seqlen_k, Config::cols, kPanel, kPanels),
        SequenceMap::make<T>(p.k, p.total_k, p.heads, p.dim_qk, p.max_seqlen_k, Config::cols, kPanel,
                             Shared::OtherKTile::kPanels)};
    if (schedule.levels > 1) {
        int* const turns = DqScratch<kHeadDim, Config>{p.dq_accum}.turns(p);
        check_cuda(cudaMemsetAsync(turns, 0, sizeof(int) * Config::cluster * dq_tiles<Config>(p), stream),
                   "clearing the turns");
        launch.together = true;  // blocks wait for one another's turns
    }
    launch.template run<kKernel>(static_cast<int>(min_of<int64_t>(schedule.places(), clusters)), p, maps, schedule);
    if constexpr (Config::relative) finish_tables(p, stream);
}

template <class T, int kHeadDim, class Mask, class Bias>
void run_backward(const BackwardParams& p, void* stream) {
    if constexpr (Bias::kKind == BiasKind::kRelative)
        launch_backward<T, kHeadDim, Mask, RelativeBackwardTile<kHeadDim>>(p, stream);
    else
        with_backward_tile<kHeadDim>(p,
                                     [&](auto tile) { launch_backward<T, kHeadDim, Mask, decltype(tile)>(p, stream); });
}

}  // namespace hstu::attention::sm90
