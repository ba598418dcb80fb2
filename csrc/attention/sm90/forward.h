// HSTU attention forward, wgmma + TMA (compute capability 9.0).
//
//   O_i = 1/N sum_j keep(i, j) silu(alpha q_i.k_j + bias_ij) v_j
//
// A block of threads stays and takes up (head, 64 * consumers query rows of one sequence) after another; each consumer
// warpgroup owns 64 of the rows and the mask's key spans are walked in tiles of `cols` keys. Roles:
//   loader (warp 0)    writes the Work down, fetches its Q, then K and V tile by tile;  waits for q_empty, k_empty, v_empty
//   storer (warp 1)    sends the finished rows, which lie where Q lay;                  waits for q_full, o_full
//                      (with a single place for Q the consumers store them, and Q is free after its last product)
//   cleaner (warp 2)   writes 0 to the rows of `out` that nobody else writes
//   consumers          S(t + 1) = Q K(t + 1)^T and O += P(t) V(t) run on the tensor cores while S(t + 1), once it is
//                      there, becomes P(t + 1) in registers;                            wait for q_full, k_full, v_full
//   bias warps         with a relative bias: write down what consumers need for it, tile after tile (relative.h);
//                                                                                       wait for work_full, described_empty,
//                      consumers wait for described_full and values_full too            values_empty
// Rows past the end of a sequence are read as 0 and silu(0) = 0, so only tiles that the mask cuts are tested element by
// element. Q has q_stages buffers: the next work's Q (and K, V, as stages come free) arrives during this one's products.
#pragma once

#include "attention/sm90/forward_consumer.h"
#include "attention/sm90/forward_relative.h"
#include "attention/sm90/forward_work.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm90 {

template <class Config>
constexpr int kThreads = (Config::consumers + 1 + kBiased<Config>)*kWarpgroup;
// What the warpgroups raise and lower their registers to must fit what the launch takes: raise_registers() waits for it.
template <class Config>
constexpr bool kRegistersFit =
    (Config::loader_registers + Config::consumers * Config::consumer_registers + Config::bias_registers) * kWarpgroup <=
    65536 / kThreads<Config> / 8 * 8 * kThreads<Config>;
template <class T, int kHeadDim, class Mask, class Config>
__global__ void __launch_bounds__(kThreads<Config>, 1)
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ Schedule schedule) {
    static_assert(kRegistersFit<Config>);
    using Shared = ForwardShared<kHeadDim, Mask, Config>;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const Shared shared(shared_memory);
    const int warp = uniform_warp();
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    let_next_kernel_start();

    if (warp < 4) {
        lower_registers<Config::loader_registers>();
        wait_for_previous_kernel();
        if (warp == 0) load_works<T>(p, maps, schedule, shared);
        if (warp == 1 && Config::q_stages > 1) store_works(maps, shared);
        if (warp == 2) clean<T, kHeadDim, Mask, Config>(p, schedule.levels);
    } else if (kBiased<Config> && warp / 4 > Config::consumers) {
        if constexpr (kBiased<Config>) {
            lower_registers<Config::bias_registers>();
            wait_for_previous_kernel();
            bias_works(p, shared);
        }
    } else {
        raise_registers<Config::consumer_registers>();
        if constexpr (kBiased<Config>)
            consume_works_with_bias<T>(p, shared, warp / 4 - 1);
        else if constexpr (Config::q_stages == 1)
            consume_works_of_one_place<T>(p, shared, warp / 4 - 1);
        else
            consume_works<T>(p, shared, warp / 4 - 1);
    }
}

template <class T, int kHeadDim, class Mask, class Config>
void launch_forward(const Params& p, void* stream) {
    using Shared = ForwardShared<kHeadDim, Mask, Config>;
    constexpr int kRows = Shared::kRows, kPanel = Shared::QTile::kPanelCols, kPanels = Shared::QTile::kPanels;
    if (max_of(p.total_q, p.total_k) > 0x7fffffff) throw std::runtime_error("hstu_ext: more than 2^31 - 1 packed rows");
    const int blocks = multiprocessors(p.device);
    const Schedule schedule(p, kRows, blocks);
    if (schedule.places() > 0x3fffffff)
        throw std::runtime_error("hstu_ext: too many row blocks: " + std::to_string(schedule.places()));
    const ForwardMaps maps{
        SequenceMap::make<T>(p.q, p.total_q, p.heads, p.dim_qk, p.max_seqlen_q, kRows, kPanel, kPanels),
        SequenceMap::make<T>(p.k, p.total_k, p.heads, p.dim_qk, p.max_seqlen_k, Config::cols, kPanel, kPanels),
        SequenceMap::make<T>(p.v, p.total_k, p.heads, p.dim_v, p.max_seqlen_k, Config::cols, kPanel, kPanels),
        SequenceMap::make<T>(p.out, p.total_q, p.heads, p.dim_v, p.max_seqlen_q, kRows, kPanel, kPanels)};
    launch_early<forward_kernel<T, kHeadDim, Mask, Config>>(min_of<int64_t>(schedule.places(), blocks),
                                                            kThreads<Config>, Shared::kBytes, p.device,
                                                            static_cast<cudaStream_t>(stream), p, maps, schedule);
}

template <class T, int kHeadDim, class Mask, class Bias>
void run_forward(const Params& p, void* stream) {
    static_assert(Bias::kKind != BiasKind::kRab);
    if constexpr (Bias::kKind == BiasKind::kRelative) {
        launch_forward<T, kHeadDim, Mask, RelativeForwardTile<kHeadDim>>(p, stream);
    } else {
        using Short = ShortForwardTile<kHeadDim>;
        if constexpr (Short::up_to > 0) {
            if (p.total_q <= int64_t{Short::up_to} * p.batch)
                return launch_forward<T, kHeadDim, Mask, Short>(p, stream);
        }
        launch_forward<T, kHeadDim, Mask, ForwardTile<kHeadDim>>(p, stream);
    }
}

}  // namespace hstu::attention::sm90
