// The roles of the sm90 forward that a relative bias adds or changes: bias warps and consumers (forward.h says who
// waits on whom, relative.h what each of them does for the bias).
#pragma once

#include "attention/sm90/forward_consumer.h"
#include "attention/sm90/relative_scores.h"

namespace hstu::attention::sm90 {

template <class Mask>
__device__ __forceinline__ RelativeSides sides_of(const Params& p, const WorkWithBias<Mask>& work) {
    return {p.relative, work.head, work.q_begin, work.k_begin, work.mask.len_q, work.mask.len_k};
}

// Windows, tables and values, in the order in which consumers come to them.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void bias_works(const Params& p, const ForwardShared<kHeadDim, Mask, Config>& shared) {
    using Shared = ForwardShared<kHeadDim, Mask, Config>;
    constexpr int kPieces = Shared::Bias::kPieces;
    const int warp = threadIdx.x / 32 % 4;
    RingPosition<Config::q_stages> q;
    RingPosition<kDescribed> at;
    RingPosition<Config::bias_stages> values[Config::consumers];
    BiasWarps<typename Shared::Bias> bias(p.alpha);
    for (int works = 0;; ++works, q.next()) {
        shared.work_full(q.stage).wait(q.phase);
        const WorkWithBias<Mask>& work = shared.work(q.stage);
        if (work.last) return;
        const TileWalk walk = work.walk;
        auto& place = shared.bias().places[q.stage];
        const int row = work.row0 + 64 * bias.group_of_lane() + 16 * warp;
        bias.begin_block(sides_of(p, work), work.row0, row < work.mask.len_q ? work.mask.kv_range(row, 16) : Spans{},
                         walk[0], place);
        // A table of all heads stays in the place.
        if (p.relative.time_head_stride != 0 || works < Config::q_stages) bias.write_tables(sides_of(p, work), place);
        for (int t = 0; t < walk.tiles; ++t, at.next()) {
            auto& tile = shared.bias().tiles[at.stage];
            shared.described_empty(at.stage).wait(at.phase ^ 1);
            bias.write_tile(tile, walk[t + 1]);
            named_sync(1, kWarpgroup);
            const PieceTimes found = bias.find(tile, walk[t]);
            __syncwarp();
            if (lane() == 0) shared.described_full(at.stage).arrive();
#pragma unroll
            for (int group = 0; group < Config::consumers; ++group) {
                unsigned left = __ballot_sync(0xffffffff, found.has_values() && lane() / kPieces == group);
                for (; left != 0; left &= left - 1, values[group].next()) {
                    const int number = __ffs(left) - 1, stage = values[group].stage;
                    shared.values_empty(group * 4 + warp, stage).wait(values[group].phase ^ 1);
                    float4* const to = shared.values(group * 4 + warp, stage);
                    if (__shfl_sync(0xffffffff, found.code, number) & PieceTimes::kWide)
                        bias.look_up_wide(sides_of(p, work), place, tile, group, number % kPieces, work.row0, walk[t],
                                          to);
                    else
                        bias.look_up(place, tile, group, number % kPieces, to);
                    __syncwarp();
                    if (lane() == 0) shared.values_full(group * 4 + warp, stage).arrive();
                }
            }
            if (lane() == 0) shared.described_empty(at.stage).arrive();
        }
    }
}

// The values that bias warps hand to one consumer warp.
template <int kHeadDim, class Mask, class Config>
struct ValuesRing {
    const ForwardShared<kHeadDim, Mask, Config>& shared;
    const int warp;
    RingPosition<Config::bias_stages> at;

    __device__ __forceinline__ void begin() const { shared.values_full(warp, at.stage).wait(at.phase); }
    __device__ __forceinline__ float4 operator()(int n) const { return shared.values(warp, at.stage)[n * 32 + lane()]; }
    __device__ __forceinline__ void end() {
        __syncwarp();
        if (lane() == 0) shared.values_empty(warp, at.stage).arrive();
        at.next();
    }
};

// One warpgroup's stream of products, with the bias: S(t + 1) begins with it while O += P(t) V(t) runs on the tensor cores.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void consume_works_with_bias(const Params& p,
                                                        const ForwardShared<kHeadDim, Mask, Config>& shared,
                                                        int group) {
    constexpr int kCols = Config::cols;
    static_assert(Config::q_stages > 1);
    const float half_alpha = 0.5f * divisor_of(p.alpha);
    const bool signals = lane() == 0;
    RingPosition<Config::stages> kv;
    RingPosition<Config::q_stages> q;
    RingPosition<kDescribed> described;
    ValuesRing<kHeadDim, Mask, Config> values{shared, static_cast<int>(threadIdx.x / 32) - 4, {}};
    Accumulator<kCols> s;
    Accumulator<kHeadDim> out;
    Fragments<kCols / 16> weights;
    float constants[kCols / kPieceCols];
    shared.q_full(0).wait(0);
    Mask mask = shared.work(0).mask;
    TileWalk walk = shared.work(0).walk;
    int row0;

    const auto read_bias = [&] {
        shared.described_full(described.stage).wait(described.phase);
        const BiasOfTile<typename ForwardShared<kHeadDim, Mask, Config>::Bias> bias(
            shared.bias().places[q.stage], shared.bias().tiles[described.stage], group);
        bias.begin_scores(s, values);
        bias.read_constants(constants);
        __syncwarp();
        if (signals) shared.described_empty(described.stage).arrive();
        described.next();
    };
    const auto add_scores = [&] {
        shared.k_full(kv.stage).wait(kv.phase);
        begin_products();
        multiply<T, kHeadDim / 16>(s, rows(shared.q(q.stage), 64 * group), rows(shared.k(kv.stage)));
        commit_products();
    };
    const auto activate_scores = [&](int t) {
        hold(s);
        if (signals) shared.k_empty(kv.stage).arrive();
        const int row = row0 + Accumulator<kCols>::row(), col = walk[t] + Accumulator<kCols>::col();
        // Behind the last key there is a bias too.
        if (mask.is_full(row0, 64, walk[t], kCols) && walk[t] + kCols <= mask.len_k)
            activate_with_constants<false>(s, constants, mask, row, col, half_alpha);
        else
            activate_with_constants<true>(s, constants, mask, row, col, half_alpha);
    };
    const auto hand_over = [&](int q_stage) { hand_rows_over<T>(out, shared, group, q_stage, p.inv_scaling); };
    const auto take = [&] { return take_work(shared, group, q, mask, walk, row0); };

    if (!take()) return;
    read_bias();
    add_scores();
    wait_products<0>();
    activate_scores(0);
    convert<T>(weights, s);
    out.clear();
    for (int t = 0;;) {
        const RingPosition<Config::stages> before = kv;
        const int before_q = q.stage;
        const bool ends = t + 1 == walk.tiles;
        start_values<T>(out, weights, shared, before);
        if (ends) {
            q.next();
            if (!take()) {
                wait_products<0>();
                hold(out);
                return hand_over(before_q);
            }
        }
        t = ends ? 0 : t + 1;
        kv.next();
        read_bias();
        wait_products<0>();
        hold(out), hold(weights);
        if (signals) shared.v_empty(before.stage).arrive();
        add_scores();
        if (ends) {
            hand_over(before_q);
            out.clear();
        }
        wait_products<0>();
        activate_scores(t);
        convert<T>(weights, s);
    }
}

}  // namespace hstu::attention::sm90
