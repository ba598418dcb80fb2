// In which order thread blocks take up the work of a launch.
#pragma once

#include "attention/params.h"
#include "common/cuda.h"
#include "common/fast_divisor.h"
#include "common/host_device.h"

namespace hstu::attention::sm80 {

// Blocks are numbered so that those with most work under a causal mask come first, across a group of (sequence, head)
// pairs: as many as leave their keys and values in the L2 cache, whose blocks read them again and again. So light
// blocks are left for the end.
struct BlockOrder {
    struct Place {
        int b, head;
        int rank;  // 0 is the heaviest block of its (sequence, head)
    };

    int group, pairs;                // (sequence, head) pairs of a group and in all
    FastDivisor by_group, by_heads;  // by the blocks of a group

    BlockOrder(const Params& p, int ranks)  // ranks: blocks along a sequence
        : group(group_size(p, ranks)), pairs(p.heads * p.batch), by_group(group * ranks), by_heads(p.heads) {}

    HSTU_HOST_DEVICE Place operator[](int block) const {
        const auto [number, index] = by_group.divide(block);
        const int size = min_of(group, pairs - number * group), rank = index / size;
        const auto [b, head] = by_heads.divide(number * group + index - rank * size);
        return {b, head, rank};
    }

  private:
    static int group_size(const Params& p, int ranks) {
        const int64_t pairs = int64_t{p.heads} * p.batch, mean_length = ceil_div<int64_t>(p.total_k, p.batch);
        const int64_t pair_bytes = max_of<int64_t>(1, 2 * mean_length * (p.dim_qk + p.dim_v));
        const int64_t most = min_of<int64_t>(pairs, INT32_MAX / ranks);
        return static_cast<int>(clamp_to<int64_t>(l2_cache_bytes(p.device) / 3 / pair_bytes, 1, most));
    }
};

}  // namespace hstu::attention::sm80
