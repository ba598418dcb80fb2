// HSTU attention forward, wgmma + TMA (compute capability 9.0).
//
//   O_i = 1/N sum_j keep(i, j) silu(alpha q_i.k_j) v_j
//
// A block of threads stays and takes up (head, 64 * consumers query rows of one sequence) after another; each consumer
// warpgroup owns 64 of the rows and the mask's key spans are walked in tiles of `cols` keys. Four roles:
//   loader (warp 0)    writes the Work down, fetches its Q, then K and V tile by tile;  waits for q_empty, k_empty, v_empty
//   storer (warp 1)    sends the finished rows, which lie where Q lay;                  waits for q_full, o_full
//                      (with a single place for Q the consumers store them, and Q is free after its last product)
//   cleaner (warp 2)   writes 0 to the rows of `out` that nobody else writes
//   consumers          S(t + 1) = Q K(t + 1)^T and O += P(t) V(t) run on the tensor cores while S(t + 1), once it is
//                      there, becomes P(t + 1) in registers;                            wait for q_full, k_full, v_full
// Rows past the end of a sequence are read as 0 and silu(0) = 0, so only tiles that the mask cuts are tested element by
// element. Q has q_stages buffers: the next work's Q (and K, V, as stages come free) arrives during this one's products.
#pragma once

#include "attention/activation.h"
#include "attention/bias.h"
#include "attention/sm90/pipeline.h"
#include "attention/sm90/product.h"
#include "attention/sm90/schedule.h"
#include "attention/sm90/tensor_map.h"
#include "attention/tile_config.h"
#include "common/cuda_launch.h"

namespace hstu::attention::sm90 {

struct ForwardMaps {
    SequenceMap q, k, v, out;
};

// One head's rows [row0, row0 + rows) of one sequence, as the loader hands it to the others.
template <class Mask>
struct Work {
    Mask mask;
    TileWalk walk;
    int head, q_begin, row0;
    bool last;  // nothing to do and nothing behind it
};

template <int kHeadDim, class Mask, class Config>
struct ForwardShared {
    static constexpr int kRows = 64 * Config::consumers, kQ = Config::q_stages, kKv = Config::stages;
    using QTile = Tile<kRows, kHeadDim>;
    using KTile = Tile<Config::cols, kHeadDim>;
    static constexpr int kTiles = kQ * QTile::kBytes + 2 * kKv * KTile::kBytes;
    static constexpr int kBarriers = 3 * kQ + 4 * kKv;
    static constexpr int kWork = kTiles + 8 * kBarriers;
    static constexpr int kBatch = kWork + kQ * sizeof(Work<Mask>);
    static constexpr int kBytes = kBatch + sizeof(SortedBatch);
    static_assert(kBytes <= 227 << 10);

    unsigned char* start;  // a multiple of 1024

    __device__ explicit ForwardShared(unsigned char* memory) : start(memory) {}

    __device__ uint32_t base() const { return shared_address(start); }
    __device__ QTile q(int stage) const { return {base() + stage * QTile::kBytes}; }  // O at the end
    __device__ KTile k(int stage) const { return {base() + kQ * QTile::kBytes + stage * KTile::kBytes}; }
    __device__ KTile v(int stage) const { return k(kKv + stage); }
    __device__ Barrier barrier(int number) const { return {base() + kTiles + 8 * number}; }
    __device__ Barrier q_full(int stage) const { return barrier(stage); }
    __device__ Barrier q_empty(int stage) const { return barrier(kQ + stage); }
    __device__ Barrier o_full(int stage) const { return barrier(2 * kQ + stage); }
    __device__ Barrier k_full(int stage) const { return barrier(3 * kQ + stage); }
    __device__ Barrier k_empty(int stage) const { return barrier(3 * kQ + kKv + stage); }
    __device__ Barrier v_full(int stage) const { return barrier(3 * kQ + 2 * kKv + stage); }
    __device__ Barrier v_empty(int stage) const { return barrier(3 * kQ + 3 * kKv + stage); }
    __device__ Work<Mask>& work(int stage) const { return reinterpret_cast<Work<Mask>*>(start + kWork)[stage]; }
    __device__ SortedBatch& batch() const { return *reinterpret_cast<SortedBatch*>(start + kBatch); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kQ; ++i) {
            q_full(i).init(1), o_full(i).init(Config::consumers * 4);
            q_empty(i).init(kQ == 1 ? Config::consumers : 1);
        }
        for (int i = 0; i < kKv; ++i) {
            k_full(i).init(1), v_full(i).init(1);
            k_empty(i).init(Config::consumers), v_empty(i).init(Config::consumers);
        }
        fence_barrier_init();
    }
};

template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void load_works(const Params& p, const ForwardMaps& maps, const Schedule& schedule,
                                           const ForwardShared<kHeadDim, Mask, Config>& shared) {
    using Shared = ForwardShared<kHeadDim, Mask, Config>;
    constexpr int kRows = Shared::kRows;
    RingPosition<Config::q_stages> q;
    RingPosition<Config::stages> kv;
    if (schedule.sorted) {
        // The tiles are still unused.
        shared.batch().sort(p, kRows, schedule.levels, schedule.of_keys,
                            *reinterpret_cast<SortedBatch::Scratch*>(shared.start));
        fence_async();
        __syncwarp();
    }
    PlaceFinder find(schedule, shared.batch());
    // 32 rounds at a time, one a lane, so that their offsets are read together.
    for (int round = lane(); __any_sync(0xffffffff, Schedule::place(round, blockIdx.x, gridDim.x) < find.last());
         round += 32) {
        const auto [b, head, level] = find(Schedule::place(round, blockIdx.x, gridDim.x));
        const int row0 = level * kRows;
        const Sequence seq(p, b);
        const Mask mask(p, seq, b, head);
        const TileWalk walk(mask.kv_range(row0, kRows), Config::cols);
        const bool wanted = level >= 0 && row0 < seq.len_q && walk.tiles > 0;
        for (unsigned left = __ballot_sync(0xffffffff, wanted); left != 0; left &= left - 1) {
            const int turn = __ffs(left) - 1;
            if (lane() == turn) {
                const SequenceRows q_rows{head, static_cast<int>(seq.q_begin), seq.len_q};
                const SequenceRows k_rows{head, static_cast<int>(seq.k_begin), seq.len_k};
                shared.q_empty(q.stage).wait(q.phase ^ 1);
                shared.work(q.stage) = {mask, walk, head, q_rows.begin, row0, false};
                shared.q_full(q.stage).arrive_expecting(Shared::QTile::kBytes);
                load_rows(shared.q(q.stage), shared.q_full(q.stage).address, maps.q, q_rows, row0);
                for (int t = 0; t < walk.tiles; ++t, kv.next()) {
                    shared.k_empty(kv.stage).wait(kv.phase ^ 1);
                    shared.k_full(kv.stage).arrive_expecting(Shared::KTile::kBytes);
                    load_rows(shared.k(kv.stage), shared.k_full(kv.stage).address, maps.k, k_rows, walk[t]);
                    shared.v_empty(kv.stage).wait(kv.phase ^ 1);
                    shared.v_full(kv.stage).arrive_expecting(Shared::KTile::kBytes);
                    load_rows(shared.v(kv.stage), shared.v_full(kv.stage).address, maps.v, k_rows, walk[t]);
                }
            }
            __syncwarp();
            kv.stage = __shfl_sync(0xffffffff, kv.stage, turn);
            kv.phase = __shfl_sync(0xffffffff, kv.phase, turn);
            q.next();
        }
    }
    if (lane() == 0) {
        shared.q_empty(q.stage).wait(q.phase ^ 1);
        shared.work(q.stage).last = true;
        shared.q_full(q.stage).arrive();
    }
}

template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void store_works(const ForwardMaps& maps,
                                            const ForwardShared<kHeadDim, Mask, Config>& shared) {
    if (!elected()) return;
    for (RingPosition<Config::q_stages> q;; q.next()) {
        shared.q_full(q.stage).wait(q.phase);
        const Work<Mask>& work = shared.work(q.stage);
        if (work.last) break;
        const SequenceRows rows{work.head, work.q_begin, work.mask.len_q};
        shared.o_full(q.stage).wait(q.phase);
        store_rows<64 * Config::consumers>(shared.q(q.stage), 0, maps.out, rows, work.row0);
        commit_copies_out();
        wait_copies_out_read<0>();
        shared.q_empty(q.stage).arrive();
    }
    wait_copies_out<0>();
}

// Writes 0 to the rows of `out` that no consumer writes: those outside the sequences' used rows and those without a key.
template <class T, int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void clean(const Params& p, int row_blocks) {
    constexpr int kRows = 64 * Config::consumers;
    const int count = row_blocks * p.heads * p.batch;
    for (int first = blockIdx.x * 32; first < count; first += 32 * gridDim.x) {
        const int number = min_of(first + lane(), count - 1), pair = number / row_blocks;
        const int b = pair / p.heads, head = pair % p.heads, row_block = number % row_blocks, row0 = row_block * kRows;
        Sequence seq(p, b);
        const bool last_block = row_block == row_blocks - 1;
        const TileWalk walk(Mask(p, seq, b, head).kv_range(row0, kRows), Config::cols);
        if (walk.tiles == 0) seq.len_q = min_of(seq.len_q, row0);
        const int owned_end = last_block ? seq.alloc_q : min_of(row0 + kRows, seq.alloc_q);
        const bool outside = row_block == 0 && ((b == 0 && seq.q_begin > 0) ||
                                                (b == p.batch - 1 && seq.q_begin + seq.alloc_q < p.total_q));
        const bool wanted = first + lane() < count && (owned_end > max_of(row0, seq.len_q) || outside);
        for (unsigned left = __ballot_sync(0xffffffff, wanted); left != 0; left &= left - 1) {
            const int turn = __ffs(left) - 1;
            const auto of_turn = [&](auto value) { return __shfl_sync(0xffffffff, value, turn); };
            zero_unused_rows<T>(p.out, of_turn(head), p.dim_v, of_turn(b), p.batch, p.total_q, of_turn(seq.q_begin),
                                of_turn(seq.alloc_q), of_turn(seq.len_q), of_turn(row0), kRows,
                                of_turn(static_cast<int>(last_block)), Team(lane(), 32));
        }
    }
}

// S -> P N = silu(alpha S), 0 where masked.
template <bool kMasked, int kCols, class Mask>
__device__ __forceinline__ void activate(Accumulator<kCols>& s, const Mask& mask, int row0, int col0,
                                         float half_alpha) {
    const typename Mask::Row rows[2] = {mask.row(row0), mask.row(row0 + 8)};
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
        float x = s.x[i];
        if constexpr (kMasked) x = rows[i / 2 % 2].keeps(col0 + i / 4 * 8 + i % 2) ? x : 0.0f;
        s.x[i] = silu_of_twice(half_alpha * x);
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

    const auto begin_scores = [&] {
        shared.k_full(kv.stage).wait(kv.phase);
        hold(s);
        begin_products();
        multiply<T, kHeadDim / 16, true>(s, rows(shared.q(q.stage), 64 * group), rows(shared.k(kv.stage)));
        commit_products();
    };
    const auto begin_values = [&](RingPosition<Config::stages> at) {
        shared.v_full(at.stage).wait(at.phase);
        begin_products();
        multiply<T, kCols / 16>(out, weights, columns(shared.v(at.stage)));
        commit_products();
    };
    const auto activate_scores = [&](int t) {
        hold(s);
        if (signals) shared.k_empty(kv.stage).arrive();
        const int row = row0 + Accumulator<kCols>::row(), col = walk[t] + Accumulator<kCols>::col();
        if (mask.is_full(row0, 64, walk[t], kCols))
            activate<false>(s, mask, row, col, half_alpha);
        else
            activate<true>(s, mask, row, col, half_alpha);
    };
    const auto convert = [&] {
#pragma unroll
        for (int step = 0; step < kCols / 16; ++step) convert_step<T>(weights, s, step);
    };
    // Rows go through Q's place to the storer.
    const auto hand_over = [&](int q_stage) {
        write_rows<T>(out, shared.q(q_stage), group, p.inv_scaling);
        fence_async();
        __syncwarp();
        if (lane() == 0) shared.o_full(q_stage).arrive();
    };

    // The next work, if there is one.
    const auto take = [&] {
        shared.q_full(q.stage).wait(q.phase);
        const Work<Mask>& work = shared.work(q.stage);
        if (work.last) return false;
        mask = work.mask, walk = work.walk, row0 = work.row0 + 64 * group;
        return true;
    };

    if (!take()) return;
    begin_scores();
    wait_products<0>();
    activate_scores(0);
    convert();
    out.clear();
    for (int t = 0;;) {
        const RingPosition<Config::stages> before = kv;
        const int before_q = q.stage;
        const bool ends = t + 1 == walk.tiles;
        if (ends) {
            q.next();
            if (!take()) {
                begin_values(kv);
                wait_products<0>();
                hold(out);
                return hand_over(before_q);
            }
        }
        t = ends ? 0 : t + 1;
        kv.next();
        begin_scores();
        begin_values(before);
        wait_products<1>();
        activate_scores(t);
        wait_products<0>();
        hold(out), hold(weights);
        if (signals) shared.v_empty(before.stage).arrive();
        if (ends) {
            hand_over(before_q);
            out.clear();
        }
        convert();
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

    const auto begin_scores = [&] {
        shared.k_full(kv.stage).wait(kv.phase);
        hold(s);
        begin_products();
        multiply<T, kHeadDim / 16, true>(s, rows(shared.q(0), 64 * group), rows(shared.k(kv.stage)));
        commit_products();
    };
    const auto begin_values = [&](RingPosition<Config::stages> at) {
        shared.v_full(at.stage).wait(at.phase);
        begin_products();
        multiply<T, kCols / 16>(out, weights, columns(shared.v(at.stage)));
        commit_products();
    };
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
        const int row = row0 + Accumulator<kCols>::row(), col = walk[t] + Accumulator<kCols>::col();
        if (mask.is_full(row0, 64, walk[t], kCols))
            activate<false>(s, mask, row, col, half_alpha);
        else
            activate<true>(s, mask, row, col, half_alpha);
    };
    const auto convert = [&] {
#pragma unroll
        for (int step = 0; step < kCols / 16; ++step) convert_step<T>(weights, s, step);
    };
    const auto store = [&] { store_directly(out, finished, p.out.row_stride, finished_rows, p.dim_v, p.inv_scaling); };
    // The work at `q`, if there is one.
    const auto take = [&] {
        shared.q_full(0).wait(q.phase);
        const Work<Mask>& work = shared.work(0);
        if (work.last) return false;
        mask = work.mask, walk = work.walk, row0 = work.row0 + 64 * group, t = 0;
        keys = row0 < mask.len_q ? mask.kv_range(row0, 64) : Spans{};
        to = p.out.at<T>(work.q_begin + row0, work.head);
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
        convert();
        out.clear();
        owes();
        for (;;) {
            const RingPosition<Config::stages> before = kv;
            ++t, kv.next();
            if (t < walk.tiles && needed()) {
                begin_scores();
                begin_values(before);
                wait_products<1>();
                activate_scores();
                end_values(before);
                convert();
                continue;
            }
            begin_values(before);
            end_values(before);
            if (!seek()) break;
            begin_scores();
            wait_products<0>();
            activate_scores();
            convert();
        }
        q.next();
        more = take();
    }
}

template <class T, int kHeadDim, class Mask, class Config>
__global__ void __launch_bounds__((Config::consumers + 1) * kWarpgroup, 1)
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ Schedule schedule) {
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
    } else {
        raise_registers<Config::consumer_registers>();
        if constexpr (Config::q_stages == 1)
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
    launch_early<forward_kernel<T, kHeadDim, Mask, Config>>(
        min_of<int64_t>(schedule.places(), blocks), (Config::consumers + 1) * kWarpgroup, Shared::kBytes, p.device,
        static_cast<cudaStream_t>(stream), p, maps, schedule);
}

template <class T, int kHeadDim, class Mask, class Bias>
void run_forward(const Params& p, void* stream) {
    static_assert(Bias::kKind == BiasKind::kNone);
    using Short = ShortForwardTile<kHeadDim>;
    if constexpr (Short::up_to > 0) {
        if (p.total_q <= int64_t{Short::up_to} * p.batch) return launch_forward<T, kHeadDim, Mask, Short>(p, stream);
    }
    launch_forward<T, kHeadDim, Mask, ForwardTile<kHeadDim>>(p, stream);
}

}  // namespace hstu::attention::sm90
