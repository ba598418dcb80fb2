// The consumers of the sm90 forward: one warpgroup's stream of products, activations and finished rows.
#pragma once

#include "attention/activation.h"
#include "attention/sm90/forward_work.h"
#include "attention/sm90/product.h"

namespace hstu::attention::sm90 {

// S -> P N = silu(alpha S), 0 where masked. In tiles of 128 keys the factor of every eight elements waits, by way of a
// zero that the compiler does not know, for a tanh of the eight before: else it would put all multiplications first and
// nothing into the time from one tanh to the next.
template <bool kMasked, int kCols, class Mask>
__device__ __forceinline__ void activate(Accumulator<kCols>& s, const Mask& mask, int row0, int col0,
                                         float half_alpha) {
    const typename Mask::Row rows[2] = {mask.row(row0), mask.row(row0 + 8)};
    const int zero = mask.len_q >> 31;
    float factor = half_alpha, tanh_before = 0.0f;
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
        if (kCols >= 128 && i % 8 == 0 && i > 0)
            factor = __int_as_float(__float_as_int(half_alpha) | (__float_as_int(tanh_before) & zero));
        float x = s.x[i];
        if constexpr (kMasked) x = rows[i / 2 % 2].keeps(col0 + i / 4 * 8 + i % 2) ? x : 0.0f;
        const float h = factor * x, tanh_here = fast_tanh(h);
        if (i % 8 == 0) tanh_before = tanh_here;
        s.x[i] = fmaf(h, tanh_here, h);
    }
}

// Scales, converts and writes 64 rows into a tile, 16 bytes a lane where lanes / 8 differ.
template <class T, int kHeadDim, class QTile>
__device__ __forceinline__ void write_rows(const Accumulator<kHeadDim>& out, QTile tile, int group, float factor) {
    const int row = 64 * group + threadIdx.x / 32 % 4 * 16 + lane() % 16;
#pragma unroll
    for (int n = 0; n < kHeadDim; n += 16) {
        const float* x = out.x + n / 2;
        const int col = n + lane() / 16 * 8;
        const uint32_t to = tile.address + col / QTile::kPanelCols * QTile::kPanelBytes +
                            QTile::chunk_offset(row, col % QTile::kPanelCols);
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = pack<T>(factor * x[2 * i], factor * x[2 * i + 1]);
        write_blocks(to, r);
    }
}

// Scales, converts and writes a warpgroup's first num_rows rows and num_cols columns to global memory. The four lanes that
// share a row exchange words, so that each writes 16 bytes and they write 64 together.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_directly(const Accumulator<kHeadDim>& out, T* global, int64_t stride,
                                               int num_rows, int num_cols, float factor) {
    const int quarter = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = Accumulator<kHeadDim>::row() + 8 * half;
        T* const to = global + row * stride + quarter * 8;
#pragma unroll
        for (int n = 0; n < kHeadDim; n += 32) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* x = out.x + n / 2 + 4 * i + 2 * half;
                words[i] = pack<T>(factor * x[0], factor * x[1]);
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i & step) continue;
                    const bool upper = quarter & step;
                    const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? words[i] : words[i ^ step], step);
                    words[i] = upper ? got : words[i];
                    words[i ^ step] = upper ? words[i ^ step] : got;
                }
            }
            if (row < num_rows && n + quarter * 8 < num_cols)
                *reinterpret_cast<uint4*>(to + n) = uint4{words[0], words[1], words[2], words[3]};
        }
    }
}

// The steps of a tile of keys, which both streams of products below are made of: S once K is there,
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void start_scores(Accumulator<Config::cols>& s,
                                             const ForwardShared<kHeadDim, Mask, Config>& shared, int group,
                                             int q_stage, RingPosition<Config::stages> kv) {
    shared.k_full(kv.stage).wait(kv.phase);
    hold(s);
    begin_products();
    multiply<T, kHeadDim / 16, true>(s, rows(shared.q(q_stage), 64 * group), rows(shared.k(kv.stage)));
    commit_products();
}
// O += P V once V is there,
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void start_values(Accumulator<kHeadDim>& out, const Fragments<Config::cols / 16>& weights,
                                             const ForwardShared<kHeadDim, Mask, Config>& shared,
                                             RingPosition<Config::stages> kv) {
    shared.v_full(kv.stage).wait(kv.phase);
    begin_products();
    multiply<T, Config::cols / 16>(out, weights, columns(shared.v(kv.stage)));
    commit_products();
}
// S -> P N of the warpgroup's rows from row0 on and the keys from col0 on, tested where the mask cuts the tile,
template <int kCols, class Mask>
__device__ __forceinline__ void activate_tile(Accumulator<kCols>& s, const Mask& mask, int row0, int col0,
                                              float half_alpha) {
    const int row = row0 + Accumulator<kCols>::row(), col = col0 + Accumulator<kCols>::col();
    if (mask.is_full(row0, 64, col0, kCols))
        activate<false>(s, mask, row, col, half_alpha);
    else
        activate<true>(s, mask, row, col, half_alpha);
}
// and P as a left operand.
template <class T, int kCols>
__device__ __forceinline__ void convert(Fragments<kCols / 16>& weights, const Accumulator<kCols>& s) {
#pragma unroll
    for (int step = 0; step < kCols / 16; ++step) convert_step<T>(weights, s, step);
}

// The last two beside one another, O += P V of one tile and S -> P N of the next; the first product is under way. The
// tensor cores take up a product whose left operand is in registers only when the one before it is nearly over, and the
// warp waits for that: so the products stand between pieces of the activation. `always` is true, which the compiler does
// not know: its branches keep the pieces apart. A piece leaves h and tanh(h) to the next, so as not to wait for results.
template <class T, bool kMasked, int kHeadDim, int kCols, class Mask, class V>
__device__ __forceinline__ void activate_beside_values(Accumulator<kCols>& s, const Mask& mask, int row0, int col0,
                                                       float half_alpha, Accumulator<kHeadDim>& out,
                                                       const Fragments<kCols / 16>& weights, const V& values,
                                                       bool always) {
    constexpr int kSteps = kCols / 16;
    const typename Mask::Row rows[2] = {mask.row(row0), mask.row(row0 + 8)};
    float tanhs[2][8];
    const auto begin = [&](int step) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float& x = s.x[8 * step + j];
            if (kMasked && !rows[j / 2 % 2].keeps(col0 + 16 * step + j / 4 * 8 + j % 2)) x = 0.0f;
            x *= half_alpha;
            tanhs[step % 2][j] = fast_tanh(x);
        }
    };
    const auto end = [&](int step) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float& h = s.x[8 * step + j];
            h = fmaf(h, tanhs[step % 2][j], h);
        }
    };
    begin(0);
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        multiply_step<T>(out, weights, values, step);
        if (step + 1 == kSteps) commit_products();
        if (always) begin(step), end(step - 1);
    }
    end(kSteps - 1);
}

// Finished rows on their way through Q's place to the storer.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void hand_rows_over(const Accumulator<kHeadDim>& out,
                                               const ForwardShared<kHeadDim, Mask, Config>& shared, int group,
                                               int q_stage, float factor) {
    write_rows<T>(out, shared.q(q_stage), group, factor);
    fence_async();
    __syncwarp();
    if (lane() == 0) shared.o_full(q_stage).arrive();
}

// A consumer warpgroup's mask, walk and first row of the work at q, if there is one.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ bool take_work(const ForwardShared<kHeadDim, Mask, Config>& shared, int group,
                                          RingPosition<Config::q_stages> q, Mask& mask, TileWalk& walk, int& row0) {
    shared.q_full(q.stage).wait(q.phase);
    const Work<Mask>& work = shared.work(q.stage);
    if (work.last) return false;
    mask = work.mask, walk = work.walk, row0 = work.row0 + 64 * group;
    return true;
}

// One warpgroup's stream of products. Its tiles follow one another across works: the scores of the next work's first tile
// are computed while the values of this work's last tile are added.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void consume_works(const Params& p, const ForwardShared<kHeadDim, Mask, Config>& shared,
                                              int group) {
    constexpr int kCols = Config::cols;
    static_assert(Config::q_stages > 1);
    const float half_alpha = 0.5f * p.alpha;
    const bool signals = threadIdx.x % kWarpgroup == 0;
    RingPosition<Config::stages> kv;
    RingPosition<Config::q_stages> q;
    Accumulator<kCols> s;
    Accumulator<kHeadDim> out;
    Fragments<kCols / 16> weights;
    shared.q_full(0).wait(0);
    Mask mask = shared.work(0).mask;
    TileWalk walk = shared.work(0).walk;
    int row0;

    const auto begin_scores = [&] { start_scores<T>(s, shared, group, q.stage, kv); };
    const auto activate_scores = [&](int t) {
        hold(s);
        if (signals) shared.k_empty(kv.stage).arrive();
        activate_tile(s, mask, row0, walk[t], half_alpha);
    };
    // Rows go through Q's place to the storer.
    const auto hand_over = [&](int q_stage) { hand_rows_over<T>(out, shared, group, q_stage, p.inv_scaling); };

    const auto take = [&] { return take_work(shared, group, q, mask, walk, row0); };

    if (!take()) return;
    begin_scores();
    wait_products<0>();
    activate_scores(0);
    convert<T>(weights, s);
    out.clear();
    for (int t = 0;;) {
        const RingPosition<Config::stages> before = kv;
        const int before_q = q.stage;
        const bool ends = t + 1 == walk.tiles;
        if (ends) {
            q.next();
            if (!take()) {
                start_values<T>(out, weights, shared, kv);
                wait_products<0>();
                hold(out);
                return hand_over(before_q);
            }
        }
        t = ends ? 0 : t + 1;
        kv.next();
        begin_scores();
        start_values<T>(out, weights, shared, before);
        wait_products<1>();
        activate_scores(t);
        wait_products<0>();
        hold(out), hold(weights);
        if (signals) shared.v_empty(before.stage).arrive();
        if (ends) {
            hand_over(before_q);
            out.clear();
        }
        convert<T>(weights, s);
    }
}

// The same where Q has a single place: the rows of a work are stored, from registers, beside the first scores of the next,
// and a warpgroup passes over the tiles that its own rows do not need.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void consume_works_of_one_place(const Params& p,
                                                           const ForwardShared<kHeadDim, Mask, Config>& shared,
                                                           int group) {
    constexpr int kCols = Config::cols;
    static_assert(Config::q_stages == 1);
    const float half_alpha = 0.5f * p.alpha;
    const bool signals = threadIdx.x % kWarpgroup == 0;
    RingPosition<Config::stages> kv;
    RingPosition<1> q;
    Accumulator<kCols> s;
    Accumulator<kHeadDim> out;
    Fragments<kCols / 16> weights;
    shared.q_full(0).wait(0);
    Mask mask = shared.work(0).mask;
    TileWalk walk = shared.work(0).walk;
    Spans keys;  // of this warpgroup's rows
    int row0, t = 0;
    T* to;                  // of row0
    T* finished = nullptr;  // the rows that `out` belongs to
    int finished_rows = 0;  // so many

    const auto begin_scores = [&] { start_scores<T>(s, shared, group, 0, kv); };
    const auto end_values = [&](RingPosition<Config::stages> at) {
        wait_products<0>();
        hold(out), hold(weights);
        if (signals) shared.v_empty(at.stage).arrive();
    };
    // This warpgroup reads no more of K and, behind the last tile, of Q.
    const auto release_k = [&] {
        if (signals) shared.k_empty(kv.stage).arrive();
        if (signals && t + 1 == walk.tiles) shared.q_empty(0).arrive();
    };
    const auto activate_scores = [&] {
        hold(s);
        release_k();
        activate_tile(s, mask, row0, walk[t], half_alpha);
    };
    const auto begin_values = [&](RingPosition<Config::stages> at) {
        shared.v_full(at.stage).wait(at.phase);
        begin_products();
        multiply_step<T>(out, weights, columns(shared.v(at.stage)), 0);
        commit_products();
    };
    const auto activate_scores_beside_values = [&](RingPosition<Config::stages> at) {
        hold(s);
        release_k();
        const int row = row0 + Accumulator<kCols>::row(), col = walk[t] + Accumulator<kCols>::col();
        const auto values = columns(shared.v(at.stage));
        const bool always = p.batch > 0;
        if (mask.is_full(row0, 64, walk[t], kCols))
            activate_beside_values<T, false>(s, mask, row, col, half_alpha, out, weights, values, always);
        else
            activate_beside_values<T, true>(s, mask, row, col, half_alpha, out, weights, values, always);
    };
    const auto store = [&] { store_directly(out, finished, p.out.row_stride, finished_rows, p.dim_v, p.inv_scaling); };
    // The work at `q`, if there is one.
    const auto take = [&] {
        if (!take_work(shared, group, q, mask, walk, row0)) return false;
        t = 0;
        keys = row0 < mask.len_q ? mask.kv_range(row0, 64) : Spans{};
        to = p.out.at<T>(shared.work(0).q_begin + row0, shared.work(0).head);
        return true;
    };
    const auto needed = [&] { return overlaps(keys, walk[t], kCols); };
    // To the work's first tile, from this one on, that these rows need; false if there is none.
    const auto seek = [&] {
        for (; t < walk.tiles; ++t, kv.next()) {
            if (needed()) return true;
            shared.k_full(kv.stage).wait(kv.phase);
            release_k();
            shared.v_full(kv.stage).wait(kv.phase);
            if (signals) shared.v_empty(kv.stage).arrive();
        }
        return false;
    };
    // On to the next tile; is there one that these rows need?
    const auto next = [&] {
        ++t, kv.next();
        return t < walk.tiles && needed();
    };
    const auto owes = [&] { finished = to, finished_rows = mask.len_q - row0; };

    out.clear();
    for (bool more = take();;) {
        while (more && !seek()) {
            store();
            out.clear();
            owes();
            q.next();
            more = take();
        }
        if (!more) return store();
        begin_scores();
        store();
        wait_products<0>();
        activate_scores();
        convert<T>(weights, s);
        out.clear();
        owes();
        RingPosition<Config::stages> before = kv;
        for (bool goes = next();;) {
            if (goes) {
                begin_scores();
                begin_values(before);
                wait_products<1>();
                activate_scores_beside_values(before);
                // What the next scores wait for, before the values end.
                const RingPosition<Config::stages> ending = before;
                before = kv;
                goes = next();
                if (goes) shared.k_full(kv.stage).wait(kv.phase);
                end_values(ending);
                convert<T>(weights, s);
                continue;
            }
            start_values<T>(out, weights, shared, before);
            end_values(before);
            if (!seek()) break;
            begin_scores();
            wait_products<0>();
            activate_scores();
            convert<T>(weights, s);
            before = kv;
            goes = next();
        }
        q.next();
        more = take();
    }
}

}  // namespace hstu::attention::sm90
