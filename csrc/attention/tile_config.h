// The tile tables of the GPU families: one row a head-dim bucket and direction. A new bucket is a row here and in the
// manifest. rows: query rows of a tile; cols: keys of a tile; blocks: thread blocks meant to share an SM.
#pragma once

namespace hstu::attention::sm80 {

// Query-stationary: a block owns `rows` queries and walks over the keys in steps of `cols`.
// warps_n: how many warps share the same rows, each with its part of the columns; P then passes through shared memory.
template <int kHeadDim>
struct ForwardTile;
template <>
struct ForwardTile<32> {
    static constexpr int rows = 64, cols = 64, warps = 4, warps_n = 1, blocks = 4;
    static constexpr bool q_in_registers = true;
};
template <>
struct ForwardTile<64> {
    static constexpr int rows = 128, cols = 64, warps = 4, warps_n = 1, blocks = 2;
    static constexpr bool q_in_registers = true;
};
template <>
struct ForwardTile<128> {
    static constexpr int rows = 128, cols = 64, warps = 4, warps_n = 1, blocks = 2;
    static constexpr bool q_in_registers = false;
};
template <>
struct ForwardTile<256> {
    static constexpr int rows = 128, cols = 64, warps = 8, warps_n = 2, blocks = 1;
    static constexpr bool q_in_registers = false;
};

// The same for batches whose mean length is at most up_to, where more and smaller blocks fill the GPU better, and for
// GPUs with 99 KB of shared memory a block (8.6, 8.9, 12.0), on which ForwardTile<256> does not fit.
template <int kHeadDim>
struct ShortForwardTile : ForwardTile<kHeadDim> {
    static constexpr int up_to = 0;
};
template <>
struct ShortForwardTile<64> {
    static constexpr int rows = 64, cols = 64, warps = 4, warps_n = 1, blocks = 4;
    static constexpr bool q_in_registers = true;
    static constexpr int up_to = 512;
};
template <>
struct ShortForwardTile<128> {
    static constexpr int rows = 64, cols = 32, warps = 4, warps_n = 1, blocks = 3;
    static constexpr bool q_in_registers = false;
    static constexpr int up_to = 224;
};
template <>
struct ShortForwardTile<256> {
    static constexpr int rows = 64, cols = 32, warps = 4, warps_n = 1, blocks = 2;
    static constexpr bool q_in_registers = false;
    static constexpr int up_to = 512;
};

// The same with a relative bias, which takes 16 keys at a time: fewer registers, more to wait for.
template <class Tile>
struct RelativeTile : Tile {};
template <>
struct RelativeTile<ForwardTile<64>> : ForwardTile<64> {
    static constexpr int blocks = 3;
};
template <>
struct RelativeTile<ShortForwardTile<64>> : ShortForwardTile<64> {
    static constexpr int blocks = 3;
};

// The backward has two kinds of blocks with the same number of threads.
// Key-stationary: a block owns `cols` keys and walks over the queries in steps of `rows`: dK, dV and, tile by tile, dQ.
// Query-stationary: a block owns `q_rows` queries and walks over the keys in steps of `q_cols`: dQ alone.
// warps_m_*: how the warps split the rows of S and dP, the keys of dK and dV, and the rows of dQ.
// stages: Q and dO tiles in flight. separate_up_to: the longest max_seqlen_k for which recomputing S for dQ beats adding
// dQ up in scratch.
template <int kHeadDim>
struct BackwardTile;
template <>
struct BackwardTile<32> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 4, stages = 2;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 4;
    static constexpr int q_rows = 128, q_cols = 32;
    static constexpr int separate_up_to = 128;
};
template <>
struct BackwardTile<64> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 3, stages = 2;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 64, q_cols = 64;
    static constexpr int separate_up_to = 512;
};
template <>
struct BackwardTile<128> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 2, stages = 2;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 64, q_cols = 64;
    static constexpr int separate_up_to = 1024;
};
template <>
struct BackwardTile<256> {
    static constexpr int rows = 64, cols = 64, warps = 8, blocks = 1, stages = 2;
    static constexpr int warps_m_s = 4, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 128, q_cols = 32;
    static constexpr int separate_up_to = 512;
};

// The same within 99 KB of shared memory.
template <int kHeadDim>
struct CompactBackwardTile : BackwardTile<kHeadDim> {};
template <>
struct CompactBackwardTile<128> : BackwardTile<128> {
    static constexpr int blocks = 1, stages = 1;
};
template <>
struct CompactBackwardTile<256> {
    static constexpr int rows = 32, cols = 32, warps = 4, blocks = 1, stages = 1;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 64, q_cols = 16;
    static constexpr int separate_up_to = 512;
};

}  // namespace hstu::attention::sm80

namespace hstu::attention::sm90 {

// consumers: warpgroups of 64 query rows each; stages: K and V tiles in flight; q_stages: Q tiles.
// Registers: loader + consumers * consumer + bias <= 504 for 384 threads, 512 for 512.
struct ForwardTileWithoutBias {
    static constexpr int bias_stages = 0, bias_registers = 0;
};
template <int kHeadDim>
struct ForwardTile;
template <>
struct ForwardTile<32> : ForwardTileWithoutBias {
    static constexpr int consumers = 3, cols = 128, stages = 4, q_stages = 2;
    static constexpr int loader_registers = 32, consumer_registers = 160;
};
template <>
struct ForwardTile<64> : ForwardTile<32> {};
template <>
struct ForwardTile<128> : ForwardTileWithoutBias {
    static constexpr int consumers = 3, cols = 64, stages = 3, q_stages = 2;
    static constexpr int loader_registers = 32, consumer_registers = 160;
};
template <>
struct ForwardTile<256> : ForwardTileWithoutBias {
    static constexpr int consumers = 2, cols = 80, stages = 2, q_stages = 1;
    static constexpr int loader_registers = 40, consumer_registers = 232;
};

// The same for batches whose mean length is at most up_to, where fewer query rows a block waste less.
template <int kHeadDim>
struct ShortForwardTile : ForwardTile<kHeadDim> {
    static constexpr int up_to = 0;
};
template <>
struct ShortForwardTile<32> : ForwardTileWithoutBias {
    static constexpr int consumers = 2, cols = 128, stages = 4, q_stages = 3;
    static constexpr int loader_registers = 56, consumer_registers = 224;
    static constexpr int up_to = 4096;
};
template <>
struct ShortForwardTile<64> : ShortForwardTile<32> {};
template <>
struct ShortForwardTile<128> : ForwardTileWithoutBias {
    static constexpr int consumers = 2, cols = 64, stages = 4, q_stages = 3;
    static constexpr int loader_registers = 56, consumer_registers = 224;
    static constexpr int up_to = 2048;
};

// With a relative bias; bias_stages: places for values of times, of 16 x 32 pairs, a consumer warp.
template <int kHeadDim>
struct RelativeForwardTile;
template <>
struct RelativeForwardTile<64> {
    static constexpr int consumers = 2, cols = 128, stages = 3, q_stages = 3, bias_stages = 3;
    static constexpr int loader_registers = 56, consumer_registers = 184, bias_registers = 88;
};
template <>
struct RelativeForwardTile<128> {
    static constexpr int consumers = 2, cols = 64, stages = 3, q_stages = 2, bias_stages = 2;
    static constexpr int loader_registers = 56, consumer_registers = 184, bias_registers = 88;
};

// A block owns `cols` keys and walks over the queries in steps of `rows`. Its two key warpgroups have 64 keys each or,
// with `split`, dV and dK of the same 64. cluster: blocks with neighbouring keys that share Q, dO and the columns of dQ.
// stages: Q and dO tiles in flight; g_stages: tiles of G; works: K and V in shared memory; unit_cols: columns of dQ that
// the query warpgroup has in registers at a time; keys_in_registers: K and V as left operands are read once a work.
// *_registers: a thread, of 512 for two key warpgroups, the query warpgroup and the loader's.
template <int kHeadDim>
struct BackwardTile;
template <>
struct BackwardTile<32> {
    static constexpr int rows = 128, cols = 128, stages = 4, works = 2, unit_cols = 32, cluster = 1, g_stages = 2;
    static constexpr int key_registers = 192, query_registers = 88, loader_registers = 40;
    static constexpr bool keys_in_registers = true, split = false, relative = false;
};
template <>
struct BackwardTile<64> {
    static constexpr int rows = 64, cols = 128, stages = 4, works = 2, unit_cols = 64, cluster = 1, g_stages = 2;
    static constexpr int key_registers = 192, query_registers = 88, loader_registers = 40;
    static constexpr bool keys_in_registers = true, split = false, relative = false;
};
template <>
struct BackwardTile<128> {
    static constexpr int rows = 64, cols = 128, stages = 2, works = 1, unit_cols = 64, cluster = 2, g_stages = 2;
    static constexpr int key_registers = 208, query_registers = 72, loader_registers = 24;
    static constexpr bool keys_in_registers = false, split = false, relative = false;
};
template <>
struct BackwardTile<256> {
    static constexpr int rows = 64, cols = 64, stages = 2, works = 1, unit_cols = 128, cluster = 2, g_stages = 1;
    static constexpr int key_registers = 192, query_registers = 104, loader_registers = 24;
    static constexpr bool keys_in_registers = false, split = true, relative = false;
};

// The same for batches whose mean length is at most up_to, where fewer rows a tile or, without the cluster, fewer keys
// waste less.
template <int kHeadDim>
struct ShortBackwardTile : BackwardTile<kHeadDim> {
    static constexpr int up_to = 0;
};
template <>
struct ShortBackwardTile<32> : BackwardTile<32> {
    static constexpr int rows = 64, up_to = 1024;
};
template <>
struct ShortBackwardTile<128> {
    static constexpr int rows = 64, cols = 128, stages = 3, works = 1, unit_cols = 64, cluster = 1, g_stages = 2;
    static constexpr int key_registers = 208, query_registers = 72, loader_registers = 24;
    static constexpr bool keys_in_registers = false, split = false, relative = false;
    static constexpr int up_to = 128;
};

// With a relative bias by position.
template <int kHeadDim>
struct RelativeBackwardTile;
template <>
struct RelativeBackwardTile<64> {
    static constexpr int rows = 64, cols = 128, stages = 4, works = 2, unit_cols = 64, cluster = 1, g_stages = 2;
    static constexpr int key_registers = 184, query_registers = 88, loader_registers = 56;
    static constexpr bool keys_in_registers = false, split = false, relative = true;
};
template <>
struct RelativeBackwardTile<128> {
    static constexpr int rows = 64, cols = 64, stages = 3, works = 1, unit_cols = 64, cluster = 2, g_stages = 2;
    static constexpr int key_registers = 184, query_registers = 88, loader_registers = 56;
    static constexpr bool keys_in_registers = false, split = true, relative = true;
};

}  // namespace hstu::attention::sm90
