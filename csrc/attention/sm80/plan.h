// How the backward computes dQ, which decides the scratch it needs. Host only.
#pragma once

#include "attention/params.h"
#include "attention/tile_config.h"

namespace hstu::attention::sm80 {

// kDirect:   one block sees every key of a sequence, so its dQ tiles are final: nothing to add up.
// kReduce:   blocks add their dQ tiles into fp32 scratch; a second kernel converts it.
// kSeparate: a query-stationary pass of its own, which recomputes S and dP. Deterministic, no scratch.
enum class DqPlan : int { kDirect, kReduce, kSeparate };

template <class Config>
int64_t dq_accum_elements(const BackwardParams& p, int head_dim) {
    return (p.total_q / Config::rows + p.batch) * p.heads * Config::rows * head_dim;
}

template <class Config>
DqPlan plan_of(const BackwardParams& p) {
    if (p.max_seqlen_k <= Config::cols) return DqPlan::kDirect;
    return p.dq_accum != nullptr ? DqPlan::kReduce : DqPlan::kSeparate;
}

// Scratch elements that the backward of this call wants in BackwardParams::dq_accum; 0 for none. With none given the
// backward still works, by kSeparate.
inline int64_t dq_accum_elements(const BackwardParams& p, int head_dim) {
    const auto wanted = [&](auto tile) -> int64_t {
        using Config = decltype(tile);
        if (p.deterministic || p.max_seqlen_k <= Config::cols || p.max_seqlen_k <= Config::separate_up_to) return 0;
        return dq_accum_elements<Config>(p, head_dim);
    };
    switch (head_dim) {
        case 32: return wanted(BackwardTile<32>{});
        case 64: return wanted(BackwardTile<64>{});
        case 128: return wanted(BackwardTile<128>{});
        default: return wanted(BackwardTile<256>{});
    }
}

}  // namespace hstu::attention::sm80
