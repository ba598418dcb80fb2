// The scan of topk_dot with the products of Hopper's warpgroups (compute capability 9.0), which a block's threads issue
// straight from its panels in shared memory.
#pragma once

#include "common/family.h"
#include "similarity/sm80/topk_scan.h"

namespace hstu::similarity::sm90 {

inline bool runs_topk_scan(int device) { return compute_capability(device) == 90 && sm90_wanted(); }

// One round of tiles, for 128 queries a block.
template <class T>
void topk_scan_round(const sm80::TopkScan& p, const sm80::Round& round, cudaStream_t stream);

}  // namespace hstu::similarity::sm90
