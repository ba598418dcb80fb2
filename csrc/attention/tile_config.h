// The tile table of the SM80 family: one row a head-dim bucket and direction. A new bucket is a row here and in the
// manifest. rows: query rows of a tile; cols: keys of a tile; blocks: thread blocks meant to share an SM.
#pragma once

namespace hstu::attention::sm80 {

// Query-stationary: a block owns `rows` queries and walks over the keys in steps of `cols`. Used by the forward.
template <int kHeadDim>
struct ForwardTile;
template <>
struct ForwardTile<32> {
    static constexpr int rows = 128, cols = 64, warps = 4, blocks = 4;
    static constexpr bool q_in_registers = true;
};
template <>
struct ForwardTile<64> {
    static constexpr int rows = 128, cols = 64, warps = 4, blocks = 3;
    static constexpr bool q_in_registers = true;
};
template <>
struct ForwardTile<128> {
    static constexpr int rows = 128, cols = 64, warps = 4, blocks = 2;
    static constexpr bool q_in_registers = false;
};
template <>
struct ForwardTile<256> {
    static constexpr int rows = 128, cols = 64, warps = 8, blocks = 1;
    static constexpr bool q_in_registers = false;
};

// The backward has two kinds of blocks with the same number of threads.
// Key-stationary: a block owns `cols` keys and walks over the queries in steps of `rows`: dK, dV and, tile by tile, dQ.
// Query-stationary: a block owns `q_rows` queries and walks over the keys in steps of `q_cols`: dQ alone.
// warps_m_*: how the warps split the rows of S and dP, the keys of dK and dV, and the rows of dQ.
// separate_up_to: the longest max_seqlen_k for which recomputing S for dQ beats adding dQ up in scratch.
template <int kHeadDim>
struct BackwardTile;
template <>
struct BackwardTile<32> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 4;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 4;
    static constexpr int q_rows = 128, q_cols = 32;
    static constexpr int separate_up_to = 0;
};
template <>
struct BackwardTile<64> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 3;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 128, q_cols = 32;
    static constexpr int separate_up_to = 256;
};
template <>
struct BackwardTile<128> {
    static constexpr int rows = 64, cols = 64, warps = 4, blocks = 2;
    static constexpr int warps_m_s = 2, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 64, q_cols = 64;
    static constexpr int separate_up_to = 512;
};
template <>
struct BackwardTile<256> {
    static constexpr int rows = 64, cols = 64, warps = 8, blocks = 1;
    static constexpr int warps_m_s = 4, warps_m_kv = 2, warps_m_q = 2;
    static constexpr int q_rows = 128, q_cols = 32;
    static constexpr int separate_up_to = 256;
};

}  // namespace hstu::attention::sm80
