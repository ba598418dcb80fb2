// What a block of the SM90 backward is told and given: places, works, shared memory, and those that hand them out: the
// loader of keys, the loader of queries and the cleaner.
#pragma once

#include "attention/sm90/backward_bias.h"
#include "attention/sm90/pipeline.h"
#include "attention/sm90/product.h"
#include "attention/sm90/schedule.h"
#include "attention/sm90/tensor_map.h"

namespace hstu::attention::sm90 {

// An arrival for all that the warp's lanes have done so far.
__device__ __forceinline__ void arrive_as_warp(Barrier barrier) {
    __syncwarp();
    if (lane() == 0) barrier.arrive();
}

// The same at the barriers of all blocks of the cluster.
template <int kCluster>
__device__ __forceinline__ void arrive_in_cluster(Barrier barrier) {
    if constexpr (kCluster == 1) return arrive_as_warp(barrier);
    __syncwarp();
    if (lane() < kCluster) barrier.arrive_at(lane());
}

struct BackwardMaps {
    SequenceMap q, dout, k, v, other_k;
};

// One head's keys [col0, col0 + cols) of one sequence, as the loader hands it to the others.
template <class Mask>
struct KeyWork {
    Mask mask;
    TileWalk walk;  // over the query rows that keep any of the keys
    int head, col0;
    int cluster_col0;      // of the first block of the cluster
    int q_begin, k_begin;  // packed rows
    int dq_tile;           // the sequence's first tile in the dQ scratch
    bool last;             // nothing to do and nothing behind it
};

template <int kHeadDim, class Mask, class Config>
struct BackwardShared {
    static constexpr int kRows = Config::rows, kCols = Config::cols, kStages = Config::stages, kWorks = Config::works;
    static constexpr int kCluster = Config::cluster, kGStages = Config::g_stages;
    static constexpr int kClusterCols = kCluster * kCols, kDqCols = kHeadDim / kCluster;  // of dQ, in each block
    using QTile = Tile<kRows, kHeadDim>;
    using KTile = Tile<kCols, kHeadDim>;
    // The other block's keys: this block's columns of dQ and, up to a panel, the other ones.
    using OtherKTile = Tile<kCols, max_of(kDqCols, KTile::kPanelCols)>;
    using GTile = Tile<kCols, kRows>;  // G^T: a row a key
    static constexpr int kOtherK = 2 * kWorks * KTile::kBytes;
    static constexpr int kRing = kOtherK + (kCluster - 1) * kWorks * OtherKTile::kBytes;
    static constexpr int kScores = kRing + 2 * kStages * QTile::kBytes;
    static constexpr int kTiles = kScores + kCluster * kGStages * GTile::kBytes;
    static constexpr int kBarriers = 2 * kStages + 24;
    static constexpr int kWork = kTiles + 8 * kBarriers;
    static constexpr int kBatch = kWork + 2 * sizeof(KeyWork<Mask>);
    using Bias = BackwardBias<kCols, kRows, kStages>;
    static constexpr int kBias = (kBatch + static_cast<int>(sizeof(SortedBatch)) + 15) / 16 * 16;
    static constexpr int kBytes = Config::relative ? kBias + sizeof(Bias) : kBatch + sizeof(SortedBatch);
    static_assert(kBytes <= 227 << 10);

    unsigned char* start;  // a multiple of 1024

    __device__ explicit BackwardShared(unsigned char* memory) : start(memory) {}
    __device__ uint32_t base() const { return shared_address(start); }
    // Of work 0 or 1, by turns. Where there is room for one work, K of the next comes to where V of this one is, which is
    // needed no longer than for the last dP, and V to where K is.
    __device__ KTile k(int work) const { return {base() + work * KTile::kBytes}; }
    __device__ KTile v(int work) const { return k(kWorks == 1 ? 1 - work : kWorks + work); }
    __device__ OtherKTile other_k(int work) const { return {base() + kOtherK + work % kWorks * OtherKTile::kBytes}; }
    __device__ QTile q(int stage) const { return {base() + kRing + stage * QTile::kBytes}; }
    __device__ QTile dout(int stage) const { return q(kStages + stage); }
    __device__ GTile g(int stage) const { return {base() + kScores + stage * GTile::kBytes}; }
    __device__ GTile other_g(int stage) const { return g(kGStages + stage); }
    __device__ Barrier barrier(int number) const { return {base() + kTiles + 8 * number}; }
    __device__ Barrier q_full(int stage) const { return barrier(stage); }  // Q and dO
    __device__ Barrier q_empty(int stage) const { return barrier(kStages + stage); }
    __device__ Barrier pair_barrier(int number) const { return barrier(2 * kStages + number); }
    __device__ Barrier g_full(int stage) const { return pair_barrier(stage); }
    __device__ Barrier g_empty(int stage) const { return pair_barrier(2 + stage); }
    __device__ Barrier turn_came(int stage) const { return pair_barrier(4 + stage); }
    __device__ Barrier turn_taken(int stage) const { return pair_barrier(6 + stage); }
    __device__ Barrier turn_over(int stage) const { return pair_barrier(8 + stage); }
    __device__ Barrier turn_passed(int stage) const { return pair_barrier(10 + stage); }
    __device__ Barrier slopes_full(int stage) const { return pair_barrier(12 + stage); }
    __device__ Barrier k_full(int work) const { return pair_barrier(14 + work); }  // K and the work
    __device__ Barrier k_empty(int work) const { return pair_barrier(16 + work); }
    __device__ Barrier v_full(int work) const { return pair_barrier(18 + work); }  // V and the other block's keys
    __device__ Barrier v_empty(int work) const { return pair_barrier(20 + work); }
    __device__ Barrier work_full(int work) const { return pair_barrier(22 + work); }  // the work alone
    __device__ KeyWork<Mask>& work(int number) const { return reinterpret_cast<KeyWork<Mask>*>(start + kWork)[number]; }
    __device__ SortedBatch& batch() const { return *reinterpret_cast<SortedBatch*>(start + kBatch); }
    __device__ Bias& bias() const { return *reinterpret_cast<Bias*>(start + kBias); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kStages; ++i) q_full(i).init(Config::relative ? 2 : 1), q_empty(i).init(8 * kCluster);
        for (int i = 0; i < 2; ++i) {
            g_full(i).init(kCols / 16), g_empty(i).init(4 * kCluster);
            turn_came(i).init(1), turn_taken(i).init(4), turn_over(i).init(4), turn_passed(i).init(1);
            slopes_full(i).init(4);
            work_full(i).init(1), k_full(i).init(1), k_empty(i).init(15);
            v_full(i).init(1), v_empty(i).init(Config::split ? 4 : 8);
        }
        fence_barrier_init();
    }
};

// First scratch tile of a sequence: sequences own whole tiles, at most total_q / rows + batch in all.
template <class Config>
__device__ __forceinline__ int first_accum_tile(const Sequence& seq, int b) {
    return static_cast<int>(seq.q_begin / Config::rows) + b;
}

// One warp: writes works down and fetches their K and V. Waits for k_empty and v_empty.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void load_works(const BackwardParams& p, const BackwardMaps& maps, const Schedule& schedule,
                                           const BackwardShared<kHeadDim, Mask, Config>& shared) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    RingPosition<2> k, k_before;
    bool any_before = false;
    if (schedule.sorted) {
        // The tiles are still unused.
        shared.batch().sort(p, Shared::kClusterCols, schedule.levels, true,
                            *reinterpret_cast<SortedBatch::Scratch*>(shared.start));
        fence_async();
        __syncwarp();
    }
    PlaceFinder find(schedule, shared.batch());
    // 32 rounds at a time, one a lane, so that their offsets are read together. From the last round to the first: light
    // works before heavy ones, as turns have to come in that order.
    const int blocks = static_cast<int>(gridDim.x) / Shared::kCluster;
    const int block = static_cast<int>(blockIdx.x) / Shared::kCluster, rank = blockIdx.x % Shared::kCluster;
    for (int first = ceil_div(find.last(), blocks) - 1; first >= 0; first -= 32) {
        const int round = first - lane();
        const auto [b, head, level] = find(round >= 0 ? Schedule::place(round, block, blocks) : find.last());
        const Sequence seq(p, b);
        const Mask mask(p, seq, b, head);
        // The first keys have most work under a causal mask, so they are the top level.
        const int levels =
            schedule.sorted ? min_of(schedule.levels, ceil_div(seq.len_k, Shared::kClusterCols)) : schedule.levels;
        const int cluster_col0 = (levels - 1 - level) * Shared::kClusterCols;
        const bool wanted = level >= 0 && cluster_col0 < seq.len_k;
        for (unsigned left = __ballot_sync(0xffffffff, wanted); left != 0; left &= left - 1) {
            const int turn = __ffs(left) - 1;
            if (lane() == turn) {
                const TileWalk walk(aligned(mask.q_range(cluster_col0, Shared::kClusterCols), Config::rows),
                                    Config::rows);
                const int col0 = cluster_col0 + rank * Config::cols;
                const SequenceRows k_rows{head, static_cast<int>(seq.k_begin), seq.len_k};
                const Barrier k_full = shared.k_full(k.stage), v_full = shared.v_full(k.stage);
                // With a place for one work, what it frees last comes last; until then the L2 cache has it.
                if (Config::works == 1) {
                    prefetch_rows<typename Shared::KTile>(maps.k, k_rows, col0);
                    prefetch_rows<typename Shared::KTile>(maps.v, k_rows, col0);
                    if (any_before) shared.v_empty(k_before.stage).wait(k_before.phase);
                } else {
                    shared.k_empty(k.stage).wait(k.phase ^ 1);
                }
                shared.work(k.stage) = {mask,
                                        walk,
                                        head,
                                        col0,
                                        cluster_col0,
                                        static_cast<int>(seq.q_begin),
                                        static_cast<int>(seq.k_begin),
                                        first_accum_tile<Config>(seq, b),
                                        false};
                shared.work_full(k.stage).arrive();
                k_full.arrive_expecting(Shared::KTile::kBytes);
                load_rows(shared.k(k.stage), k_full.address, maps.k, k_rows, col0, 0, kReadOnce);
                if (Config::works == 1 && any_before) shared.k_empty(k_before.stage).wait(k_before.phase);
                v_full.arrive_expecting(Shared::KTile::kBytes + (Shared::kCluster - 1) * Shared::OtherKTile::kBytes);
                load_rows(shared.v(k.stage), v_full.address, maps.v, k_rows, col0, 0, kReadOnce);
                if constexpr (Shared::kCluster == 2)
                    load_rows(shared.other_k(k.stage), v_full.address, maps.other_k, k_rows,
                              cluster_col0 + (1 - rank) * Config::cols,
                              rank * Shared::kDqCols / Shared::KTile::kPanelCols * Shared::KTile::kPanelCols,
                              kReadOnce);
            }
            __syncwarp();
            k_before = k, any_before = true;
            k.next();
        }
    }
    if (lane() == 0) {
        shared.k_empty(k.stage).wait(k.phase ^ 1);
        shared.work(k.stage).last = true;
        shared.work_full(k.stage).arrive();
        shared.k_full(k.stage).arrive();
    }
}

// One thread: fetches Q and dO tile by tile; with a relative bias a warp, which also writes windows. Waits for
// work_full and q_empty.
template <int kHeadDim, class Mask, class Config>
__device__ __forceinline__ void load_queries(const BackwardParams& p, const BackwardMaps& maps,
                                             const BackwardShared<kHeadDim, Mask, Config>& shared) {
    using Shared = BackwardShared<kHeadDim, Mask, Config>;
    using Rows = RowsIn<typename Shared::QTile, Shared::kCluster>;
    const int rank = blockIdx.x % Shared::kCluster;
    RingPosition<Config::stages> q;
    for (RingPosition<2> k;; k.next()) {
        shared.work_full(k.stage).wait(k.phase);
        if (shared.work(k.stage).last) break;
        const TileWalk walk = shared.work(k.stage).walk;
        const SequenceRows rows{shared.work(k.stage).head, shared.work(k.stage).q_begin,
                                shared.work(k.stage).mask.len_q};
        if (!Config::relative) shared.k_empty(k.stage).arrive();
        for (int t = 0; t < walk.tiles; ++t, q.next()) {
            const Barrier full = shared.q_full(q.stage);
            // Of a cluster's blocks one fetches Q for both, the other dO.
            const Rows first(rank == 0 ? maps.q : maps.dout, rows, walk[t]);
            shared.q_empty(q.stage).wait(q.phase ^ 1);
            if (!Config::relative || lane() == 0) {
                full.arrive_expecting(2 * Shared::QTile::kBytes);
                first.start(rank == 0 ? shared.q(q.stage) : shared.dout(q.stage), full.address);
                if constexpr (Shared::kCluster == 1)
                    Rows(maps.dout, rows, walk[t]).start(shared.dout(q.stage), full.address);
            }
            if constexpr (Config::relative) {
                __syncwarp();
                write_window(shared.bias(), q.stage, p, shared.work(k.stage), walk[t]);
                arrive_as_warp(full);
            }
        }
        if constexpr (Config::relative) arrive_as_warp(shared.k_empty(k.stage));
    }
}

// One warp: writes 0 to the rows of dq, dk and dv that no product reaches. A row of queries keeps no key only where a
// sequence has more queries than keys.
template <class T, class Mask, class Config>
__device__ __forceinline__ void clean_works(const BackwardParams& p, int col_blocks) {
    constexpr int kCols = Config::cluster * Config::cols;
    const Team team(lane(), 32);
    const int count = col_blocks * p.heads * p.batch;
    for (int from = blockIdx.x * 32; from < count; from += 32 * gridDim.x) {
        const int number = min_of(from + lane(), count - 1);
        const Sequence of_lane(p, number / col_blocks / p.heads);
        const bool at_edge = number / col_blocks / p.heads == 0 || number / col_blocks / p.heads == p.batch - 1;
        const bool wanted = from + lane() < count && (at_edge || of_lane.len_k < of_lane.alloc_k ||
                                                      of_lane.len_q < of_lane.alloc_q || of_lane.len_q > of_lane.len_k);
        for (unsigned left = __ballot_sync(0xffffffff, wanted); left != 0; left &= left - 1) {
            const int chosen = from + __ffs(left) - 1, pair = chosen / col_blocks, block = chosen % col_blocks;
            const int b = pair / p.heads, head = pair % p.heads, col0 = block * kCols;
            const bool last_block = block == col_blocks - 1;
            const Sequence seq(p, b);
            zero_unused_rows<T>(p.dk, head, p.dim_qk, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0,
                                kCols, last_block, team);
            zero_unused_rows<T>(p.dv, head, p.dim_v, b, p.batch, p.total_k, seq.k_begin, seq.alloc_k, seq.len_k, col0,
                                kCols, last_block, team);
            if (block != 0) continue;
            zero_unused_rows<T>(p.dq, head, p.dim_qk, b, p.batch, p.total_q, seq.q_begin, seq.alloc_q,
                                seq.len_k > 0 ? seq.len_q : 0, 0, seq.alloc_q, true, team);
            if (seq.len_k == 0 || seq.len_q <= seq.len_k) continue;
            const Mask mask(p, seq, b, head);
            for (int row0 = 0; row0 < seq.len_q; row0 += Config::rows)
                if (KeyTileRank(mask, row0, Config::rows, 0, kCols).count == 0)
                    zero_rows<T>(p.dq, head, seq.q_begin + row0, seq.q_begin + min_of(row0 + Config::rows, seq.len_q),
                                 p.dim_qk, team);
        }
    }
}

}  // namespace hstu::attention::sm90
