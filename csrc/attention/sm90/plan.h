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

// f(tile) for the tile that serves this batch.
template <int kHeadDim, class F>
auto with_backward_tile(const BackwardParams& p, const F& f) {
    using Short = ShortBackwardTile<kHeadDim>;
    if constexpr (Short::up_to > 0) {
        if (p.total_k <= int64_t{Short::up_to} * p.batch) return f(Short{});
    }
    return f(BackwardTile<kHeadDim>{});
}

// fp32 elements of BackwardParams::dq_accum: the sums of every tile, then its counters of turns. None where one
// cluster sees every key of a sequence. As many as any tile wants that may serve the batch, with a relative bias or without.
inline int64_t dq_scratch_elements(const BackwardParams& p, int head_dim) {
    const auto wanted = [&](auto tile) -> int64_t {
        using Config = decltype(tile);
        return p.max_seqlen_k <= Config::cluster * Config::cols
                   ? 0
                   : dq_tiles<Config>(p) * (Config::rows * head_dim + Config::cluster);
    };
    switch (head_dim) {
        case 32: return with_backward_tile<32>(p, wanted);
        case 64: return max_of(with_backward_tile<64>(p, wanted), wanted(RelativeBackwardTile<64>{}));
        case 128: return max_of(with_backward_tile<128>(p, wanted), wanted(RelativeBackwardTile<128>{}));
        default: return with_backward_tile<256>(p, wanted);
    }
}

}  // namespace hstu::attention::sm90
