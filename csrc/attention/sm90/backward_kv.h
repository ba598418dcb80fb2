// The warpgroups of the SM90 backward that own keys: S, dP, dV and dK.
#pragma once

#include "attention/activation.h"
#include "attention/sm90/backward_sums.h"
#include "attention/sm90/backward_work.h"

namespace hstu::attention::sm90 {

// 16-byte address within a tile for ldmatrix and stmatrix x4 of 16 rows x 16 columns, from (row, col) on.
template <class Tile>
__device__ __forceinline__ uint32_t matrix_address(Tile tile, int row, int col) {
    const int r = row + lane() % 16, c = col + lane() / 16 * 8;
    return tile.address + c / Tile::kPanelCols * Tile::kPanelBytes + Tile::chunk_offset(r, c % Tile::kPanelCols);
}

// Rows [row, row + 16) of a tile as this warp's part of a left operand.
template <int kSteps, class Tile>
__device__ __forceinline__ void load_fragments(Fragments<kSteps>& to, Tile tile, int row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) read_blocks(to.x[step], matrix_address(tile, row, 16 * step));
}
template <int kSteps, class Tile>
__device__ __forceinline__ void store_fragments(const Fragments<kSteps>& from, Tile tile, int row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) write_blocks(matrix_address(tile, row, 16 * step), from.x[step]);
}

// A warp's 16 rows of G^T, for this block's query warpgroup and that of the other block of the cluster.
template <int kSteps, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void hand_out_gradients(const Fragments<kSteps>& gradients,
                                                   const BackwardShared<kHeadDim, Mask, Config>& shared, int stage,
                                                   int row) {
    using GTile = typename BackwardShared<kHeadDim, Mask, Config>::GTile;
    const GTile tile = shared.g(stage);
    const Barrier full = shared.g_full(stage);
    store_fragments(gradients, tile, row);
    fence_async();
    if constexpr (Config::cluster == 1) return arrive_as_warp(full);
    __syncwarp();
    if (lane() != 0) return;
    const int other = 1 - blockIdx.x % 2;
#pragma unroll
    for (int panel = 0; panel < GTile::kPanels; ++panel) {
        const uint32_t from = panel * GTile::kPanelBytes + row * GTile::kRowBytes;
        copy_to_block(other, shared.other_g(stage).address + from, tile.address + from, 16 * GTile::kRowBytes, full);
    }
    if (row == 0)
        full.arrive_expecting(GTile::kBytes);  // what the other block copies here
    else
        full.arrive();
}

// Word i of lane j of a quad becomes word j of lane i.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&w)[4]) {
    const bool upper = lane() & 2, odd = lane() & 1;
    const uint32_t a = __shfl_xor_sync(0xffffffff, upper ? w[0] : w[2], 2);
    const uint32_t b = __shfl_xor_sync(0xffffffff, upper ? w[1] : w[3], 2);
    const uint32_t low[2] = {upper ? a : w[0], upper ? b : w[1]}, high[2] = {upper ? w[2] : a, upper ? w[3] : b};
    const uint32_t c = __shfl_xor_sync(0xffffffff, odd ? low[0] : low[1], 1);
    const uint32_t d = __shfl_xor_sync(0xffffffff, odd ? high[0] : high[1], 1);
    w[0] = odd ? c : low[0], w[1] = odd ? low[1] : c, w[2] = odd ? d : high[0], w[3] = odd ? high[1] : d;
}

// Scales, converts and writes a product's first num_rows rows and num_cols columns, 16 bytes a lane. Nobody reads them
// soon: the L2 cache is for dQ's sums.
template <class T, int kCols>
__device__ __forceinline__ void store_product(const Accumulator<kCols>& acc, float factor, T* to, int64_t stride,
                                              int num_rows, int num_cols) {
    const int col = lane() % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = Accumulator<kCols>::row() + 8 * half;
#pragma unroll
        for (int n = 0; n < kCols; n += 32) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* x = acc.x + (n / 8 + i) * 4 + half * 2;
                w[i] = pack<T>(factor * x[0], factor * x[1]);
            }
            transpose_in_quad(w);
            if (row < num_rows && n + col < num_cols)
                __stcs(reinterpret_cast<uint4*>(to + row * stride + n + col), uint4{w[0], w[1], w[2], w[3]});
        }
    }
}

// 2 silu'(S) - 1 of a tile in half precision, -1 where masked; as an accumulator, two elements a word.
template <int kRows>
struct Slopes {
    __half2 x[kRows / 4];
};

// S^T -> P^T N as a left operand, 0 where masked, and the slopes.
template <class T, bool kMasked, int kRows, class Mask>
__device__ __forceinline__ void activate(const Accumulator<kRows>& s, Fragments<kRows / 16>& weights,
                                         Slopes<kRows>& slopes, const Mask& mask, int row0, int col0,
                                         float half_alpha) {
    const int row = row0 + Accumulator<kRows>::col(), col = col0 + Accumulator<kRows>::row();
#pragma unroll
    for (int block = 0; block < kRows / 8; ++block) {
        TwiceSiluSlope silu[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) silu[i] = twice_silu_slope(half_alpha * s.x[block * 4 + i]);
        if constexpr (kMasked) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const typename Mask::Row rule = mask.row(row + block * 8 + c);
#pragma unroll
                for (int i = c; i < 4; i += 2)
                    if (!rule.keeps(col + i / 2 * 8)) silu[i] = {0.0f, -1.0f};
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const TwiceSiluSlope &low = silu[2 * half], &high = silu[2 * half + 1];
            weights.x[block / 2][block % 2 * 2 + half] = pack<T>(low.value, high.value);
            slopes.x[block * 2 + half] = __floats2half2_rn(low.twice_slope_minus_one, high.twice_slope_minus_one);
        }
    }
}

// dP^T -> 2 G^T N, also as a left operand.
template <class T, int kRows>
__device__ __forceinline__ void apply_slopes(Accumulator<kRows>& dp, const Slopes<kRows>& slopes,
                                             Fragments<kRows / 16>& gradients) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        const float2 slope = __half22float2(slopes.x[i]);
        float &low = dp.x[2 * i], &high = dp.x[2 * i + 1];
        low = fmaf(slope.x, low, low), high = fmaf(slope.y, high, high);
        gradients.x[i / 4][i % 4] = pack<T>(low, high);
    }
}

// Keys as the left operand of S^T and dP^T: in shared memory, or in registers where there is room.
template <class Tile, int kSteps, bool kInRegisters>
struct Keys {
    SharedOperand<Tile, false> operand;

    __device__ __forceinline__ Keys(Tile tile, int first) : operand(rows(tile, first)) {}
    template <class T, int kRows, class B>
    __device__ __forceinline__ void multiply_into(Accumulator<kRows>& acc, const B& b) {
        multiply<T, kSteps, true>(acc, operand, b);
    }
};
template <class Tile, int kSteps>
struct Keys<Tile, kSteps, true> {
    Fragments<kSteps> operand;

    __device__ __forceinline__ Keys(Tile tile, int first) {
        load_fragments(operand, tile, first + threadIdx.x / 32 % 4 * 16);
    }
    template <class T, int kRows, class B>
    __device__ __forceinline__ void multiply_into(Accumulator<kRows>& acc, const B& b) {
        hold(operand);
        multiply<T, kSteps, true>(acc, operand, b);
    }
};

// The distance of the first of 16 keys and of a tile's first query.
template <class Mask>
__device__ __forceinline__ int corner_of(const KeyWork<Mask>& work, int t, int strip) {
    return work.walk[t] + work.mask.offset - work.col0 - 16 * strip;
}

// A key warpgroup's registers over one work, and what it does with one query tile after another.
template <class T, int kHeadDim, class Mask, class Config>
struct KeyGroup {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Operand = Keys<typename Shared::KTile, kHeadDim / 16, Config::keys_in_registers>;
    using Relative = std::conditional_t<Config::relative, KeySums<typename Shared::Bias>, NoKeySums>;
    static constexpr int kRows = Config::rows, kSteps = kRows / 16;

    const BackwardParams& p;
    const Shared& shared;     // the mask and the walk are read there again and again: registers are what is short
    const int group, number;  // which 64 keys, of which work in shared memory
    Operand keys, values;
    Accumulator<kHeadDim> dk, dv;
    Accumulator<kRows> s, dp;
    Slopes<kRows> slopes;
    Fragments<kSteps> weights, gradients;
    Relative relative;

    __device__ __forceinline__ KeyGroup(const BackwardParams& p, const Shared& shared, int group, int number)
        : p(p), shared(shared), group(group), number(number), keys(shared.k(number), 64 * group),
          values(shared.v(number), 64 * group),
          relative(shared.bias(), 4 * group + threadIdx.x / 32 % 4, p, shared.work(number).head) {
        dk.clear();
        dv.clear();
    }

    __device__ __forceinline__ void start_s(int stage) {
        begin_products();
        keys.template multiply_into<T>(s, rows(shared.q(stage)));
        commit_products();
    }
    __device__ __forceinline__ void start_dp(int stage) {
        begin_products();
        values.template multiply_into<T>(dp, rows(shared.dout(stage)));
        commit_products();
    }
    // S is there: P and the slopes.
    __device__ __forceinline__ void use_s(int t, int stage, float half_alpha) {
        const int row0 = shared.work(number).walk[t], first_key = shared.work(number).col0 + 64 * group;
        const Mask mask = shared.work(number).mask;
        hold(s);
        if constexpr (Config::relative) {
            add_half_bias(s, shared.bias(), stage, relative.strip, half_alpha);
            half_alpha = 1.0f;
        }
        if (mask.is_full(row0, kRows, first_key, 64))
            activate<T, false>(s, weights, slopes, mask, row0, first_key, half_alpha);
        else
            activate<T, true>(s, weights, slopes, mask, row0, first_key, half_alpha);
    }
    __device__ __forceinline__ void start_dv(int stage) {
        hold(weights);
        begin_products();
        multiply<T, kSteps>(dv, weights, columns(shared.dout(stage)));
        commit_products();
    }
    // dP is there: G, which also goes to the query warpgroup.
    __device__ __forceinline__ void use_dp(RingPosition<Config::g_stages> g) {
        hold(dp);
        apply_slopes<T>(dp, slopes, gradients);
        shared.g_empty(g.stage).wait(g.phase ^ 1);
        hand_out_gradients(gradients, shared, g.stage, 64 * group + threadIdx.x / 32 % 4 * 16);
    }
    __device__ __forceinline__ void start_dk(int stage) {
        hold(gradients);
        begin_products();
        multiply<T, kSteps>(dk, gradients, columns(shared.q(stage)));
        commit_products();
    }
    // From S, which is there, to dV and, under way, dK. q and g go on to the next tile.
    __device__ __forceinline__ void pass_tile(int t, float half_alpha, RingPosition<Config::stages>& q,
                                              RingPosition<Config::g_stages>& g) {
        const int stage = q.stage;
        use_s(t, stage, half_alpha);
        start_dp(stage);
        start_dv(stage);
        wait_products<0>();
        hold(dv);
        hold(weights);
        use_dp(g);
        g.next();
        q.next();
        start_dk(stage);
    }
    // Of a tile whose G is there, beside products: the sums of the position table's gradient.
    __device__ __forceinline__ void add_to_table(int t) {
        if constexpr (Config::relative) relative.add(dp, p, corner_of(shared.work(number), t, relative.strip));
    }
    __device__ __forceinline__ void finish_sums() {
        wait_products<0>();
        hold(dv);
        hold(dk);
        hold(gradients);
    }
};

// Warpgroup `group` of two: 64 of a work's keys. Waits for k_full, v_full, q_full and g_empty.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void own_keys(const BackwardParams& p, const BackwardShared<kHeadDim, Mask, Config>& shared,
                                         int group) {
    RingPosition<Config::stages> q;
    RingPosition<Config::g_stages> g;
    for (RingPosition<2> k;; k.next()) {
        shared.k_full(k.stage).wait(k.phase);
        if (shared.work(k.stage).last) break;
        const int tiles = __shfl_sync(0xffffffff, shared.work(k.stage).walk.tiles, 0);
        if (Config::keys_in_registers) shared.v_full(k.stage).wait(k.phase);
        KeyGroup<T, kHeadDim, Mask, Config> own(p, shared, group, k.stage);
        const float half_alpha = 0.5f * p.alpha;
        if constexpr (Config::relative) {
            // One loop body for all tiles: the code is long.
            shared.v_full(k.stage).wait(k.phase);
            if (tiles > 0) {
                shared.q_full(q.stage).wait(q.phase);
                own.start_s(q.stage);
                wait_products<0>();
            }
            for (int t = 0; t < tiles; ++t) {
                const int stage = q.stage;
                own.pass_tile(t, half_alpha, q, g);
                // The last tile's S once more instead of a next one's, as ptxas wants the same products on every way.
                const bool last = t == tiles - 1;
                if (!last) shared.q_full(q.stage).wait(q.phase);
                own.start_s(last ? stage : q.stage);
                own.add_to_table(t);
                own.finish_sums();
                arrive_in_cluster<Config::cluster>(shared.q_empty(stage));
            }
            arrive_as_warp(shared.v_empty(k.stage));
        } else if (tiles > 0) {
            shared.q_full(q.stage).wait(q.phase);
            own.start_s(q.stage);
            shared.v_full(k.stage).wait(k.phase);
            wait_products<0>();
            for (int t = 0; t < tiles - 1; ++t) {
                const int stage = q.stage;
                own.pass_tile(t, half_alpha, q, g);
                shared.q_full(q.stage).wait(q.phase);
                own.start_s(q.stage);
                wait_products<1>();
                arrive_in_cluster<Config::cluster>(shared.q_empty(stage));
                own.finish_sums();
            }
            own.use_s(tiles - 1, q.stage, half_alpha);
            own.start_dp(q.stage);
            own.start_dv(q.stage);
            wait_products<1>();
            arrive_as_warp(shared.v_empty(k.stage));
            own.use_dp(g);
            own.start_dk(q.stage);
            own.finish_sums();
            arrive_in_cluster<Config::cluster>(shared.q_empty(q.stage));
            g.next();
            q.next();
        } else {
            shared.v_full(k.stage).wait(k.phase);
            arrive_as_warp(shared.v_empty(k.stage));
        }
        const int head = shared.work(k.stage).head, first_key = shared.work(k.stage).col0 + 64 * group;
        const int num_rows = shared.work(k.stage).mask.len_k - first_key;
        const int64_t packed_key = int64_t{shared.work(k.stage).k_begin} + first_key;
        if constexpr (Config::relative) own.relative.finish(p);
        arrive_as_warp(shared.k_empty(k.stage));
        store_product(own.dv, p.inv_scaling, p.dv.at<T>(packed_key, head), p.dv.row_stride, num_rows, p.dim_v);
        store_product(own.dk, 0.5f * p.alpha * p.inv_scaling, p.dk.at<T>(packed_key, head), p.dk.row_stride, num_rows,
                      p.dim_qk);
    }
}

}  // namespace hstu::attention::sm90
