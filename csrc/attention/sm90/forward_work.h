// What a block of the sm90 forward shares, and the warps beside its consumers: loader, storer, cleaner and, with a relative
// bias, describer and bias warps (forward.h says who waits on whom).
#pragma once

#include <type_traits>

#include "attention/bias.h"
#include "attention/sm90/pipeline.h"
#include "attention/sm90/relative.h"
#include "attention/sm90/schedule.h"
#include "attention/sm90/tensor_map.h"

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
template <class Mask>
struct WorkWithBias : Work<Mask> {
    int k_begin;
};

template <class Config>
constexpr bool kBiased = Config::bias_stages > 0;

constexpr int kDescribed = 3;  // tiles in shared memory that are described

template <int kHeadDim, class Mask, class Config>
struct ForwardShared {
    static constexpr int kRows = 64 * Config::consumers, kQ = Config::q_stages, kKv = Config::stages;
    using QTile = Tile<kRows, kHeadDim>;
    using KTile = Tile<Config::cols, kHeadDim>;
    using WorkHere = std::conditional_t<kBiased<Config>, WorkWithBias<Mask>, Work<Mask>>;
    using Bias = BiasShared<Config::consumers, Config::cols, kQ, kDescribed>;
    static constexpr int kValues = 4 * Config::consumers * Config::bias_stages, kValuesBytes = 16 * kPieceCols * 4;
    static constexpr int kBiases = kQ * QTile::kBytes + 2 * kKv * KTile::kBytes;
    static constexpr int kTiles = kBiases + kValues * kValuesBytes;
    static constexpr int kBarriers = 3 * kQ + 4 * kKv + 2 * kValues + (kQ + 2 * kDescribed) * kBiased<Config>;
    static constexpr int kWork = kTiles + 8 * kBarriers;
    static constexpr int kBatch = kWork + kQ * sizeof(WorkHere);
    static constexpr int kTables = (kBatch + static_cast<int>(sizeof(SortedBatch)) + 15) / 16 * 16;
    static constexpr int kBytes = kBiased<Config> ? kTables + sizeof(Bias) : kBatch + sizeof(SortedBatch);
    static_assert(kBytes <= 227 << 10);

    // Who says that K and V are read: a consumer's first thread or, where its warps differ in what they do, each of them.
    static constexpr int kSignals = Config::consumers * (kBiased<Config> ? 4 : 1);

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
    // Of a consumer warp, by its number among all.
    __device__ Barrier values_full(int warp, int stage) const {
        return barrier(3 * kQ + 4 * kKv + warp * Config::bias_stages + stage);
    }
    __device__ Barrier values_empty(int warp, int stage) const {
        return {values_full(warp, stage).address + 8 * kValues};
    }
    __device__ Barrier work_full(int stage) const { return barrier(3 * kQ + 4 * kKv + 2 * kValues + stage); }
    __device__ Barrier described_full(int tile) const { return {work_full(kQ + tile).address}; }
    __device__ Barrier described_empty(int tile) const { return {work_full(kQ + kDescribed + tile).address}; }
    // 16 rows and a piece's columns of times: [kPieceCols / 8 blocks of columns][32 lanes].
    __device__ float4* values(int warp, int stage) const {
        return reinterpret_cast<float4*>(start + kBiases + (warp * Config::bias_stages + stage) * kValuesBytes);
    }
    __device__ Bias& bias() const { return *reinterpret_cast<Bias*>(start + kTables); }
    __device__ WorkHere& work(int stage) const { return reinterpret_cast<WorkHere*>(start + kWork)[stage]; }
    __device__ SortedBatch& batch() const { return *reinterpret_cast<SortedBatch*>(start + kBatch); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kQ; ++i) {
            q_full(i).init(1), o_full(i).init(Config::consumers * 4);
            q_empty(i).init(kQ == 1 ? Config::consumers : 1);
        }
        for (int i = 0; i < kKv; ++i) {
            k_full(i).init(1), v_full(i).init(1);
            k_empty(i).init(kSignals), v_empty(i).init(kSignals);
        }
        if constexpr (kBiased<Config>) {
            for (int i = 0; i < kValues; ++i) values_full(0, i).init(1), values_empty(0, i).init(1);
            for (int i = 0; i < kQ; ++i) work_full(i).init(1);
            for (int i = 0; i < kDescribed; ++i)
                described_full(i).init(4), described_empty(i).init(4 + 4 * Config::consumers);
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
                static_cast<Work<Mask>&>(shared.work(q.stage)) = {mask, walk, head, q_rows.begin, row0, false};
                if constexpr (kBiased<Config>) {
                    shared.work(q.stage).k_begin = k_rows.begin;
                    shared.work_full(q.stage).arrive();
                }
                shared.q_full(q.stage).arrive_expecting(Shared::QTile::kBytes);
                load_rows(shared.q(q.stage), shared.q_full(q.stage).address, maps.q, q_rows, row0);
                const auto fetch_k = [&](RingPosition<Config::stages> at, int t) {
                    shared.k_empty(at.stage).wait(at.phase ^ 1);
                    shared.k_full(at.stage).arrive_expecting(Shared::KTile::kBytes);
                    load_rows(shared.k(at.stage), shared.k_full(at.stage).address, maps.k, k_rows, walk[t]);
                };
                // Of two places, consumers free that of the next K before that of V.
                constexpr bool kAhead = Config::stages == 2;
                if (kAhead) fetch_k(kv, 0);
                for (int t = 0; t < walk.tiles; ++t, kv.next()) {
                    if (!kAhead) fetch_k(kv, t);
                    if (kAhead && t + 1 < walk.tiles) {
                        RingPosition<Config::stages> next = kv;
                        next.next();
                        fetch_k(next, t + 1);
                    }
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
        if constexpr (kBiased<Config>) shared.work_full(q.stage).arrive();
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

}  // namespace hstu::attention::sm90
