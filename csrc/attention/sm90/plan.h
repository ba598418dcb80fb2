// The scratch of the SM90 backward. Host only.
#pragma once

#include "attention/params.h"
#include "attention/tile_config.h"

namespace hstu::attention::sm90 {

// Tiles of dQ over all sequences and heads: a sequence owns whole ones.
template <class Config>
HSTU_HOST_DEVICE int64_t dq_tiles(const BackwardParams& p) {
    return (p.total_q / Config::rows + p.batch) * p.heads;
}

// fp32 elements of BackwardParams::dq_accum: the sums of every tile, then its counters of turns. None where one
// cluster sees every key of a sequence.
inline int64_t dq_scratch_elements(const BackwardParams& p, int head_dim) {
    const auto wanted = [&](auto tile) -> int64_t {
        using Config = decltype(tile);
        return p.max_seqlen_k <= Config::cluster * Config::cols
                   ? 0
                   : dq_tiles<Config>(p) * (Config::rows * head_dim + Config::cluster);
    };
    switch (head_dim) {
        case 32: return wanted(BackwardTile<32>{});
        case 64: return wanted(BackwardTile<64>{});
        case 128: return wanted(BackwardTile<128>{});
        default: return wanted(BackwardTile<256>{});
    }
}

}  // namespace hstu::attention::sm90
