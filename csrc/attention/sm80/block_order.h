// In which order thread blocks take up the work of a launch.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "common/fast_divisor.h"
#include "common/host_device.h"

namespace hstu::attention::sm80 {

// Blocks are numbered by groups of (sequence, head) pairs, and in a group those with most work under a causal mask come
// first. A group is as many pairs as leave their keys and values in the L2 cache, where their blocks read them again and
// again. The last group also takes the remainder and is at least two rounds of all multiprocessors: its light blocks
// are what evens out the end of the launch.
struct BlockOrder {
    struct Place {
        int b, head;
        int rank;  // 0 is the heaviest block of its (sequence, head)
    };

    int ranks, pairs;       // blocks along a sequence; (sequence, head) pairs
    int group, last_group;  // pairs of a group; number of the last one
    FastDivisor by_group, by_heads;

    // resident: blocks that the GPU runs at the same time; cache_bytes: its L2 cache.
    BlockOrder(const Params& p, int ranks, int resident, int cache_bytes)
        : ranks(ranks), pairs(p.heads * p.batch), group(group_size(p, ranks, cache_bytes / 3)),
          last_group(max_of(0, pairs - max_of(group, ceil_div(2 * resident, ranks))) / group), by_group(group * ranks),
          by_heads(p.heads) {}

    HSTU_HOST_DEVICE Place operator[](int block) const {
        const int number = min_of(by_group.divide(block).quotient, last_group), first = number * group;
        const int index = block - first * ranks, size = number < last_group ? group : pairs - first;
        const int rank = index / size;
        const auto [b, head] = by_heads.divide(first + index - rank * size);
        return {b, head, rank};
    }

  private:
    static int group_size(const Params& p, int ranks, int bytes) {
        const int64_t pairs = int64_t{p.heads} * p.batch, mean_length = ceil_div<int64_t>(p.total_k, p.batch);
        const int64_t pair_bytes = max_of<int64_t>(1, 2 * mean_length * (p.dim_qk + p.dim_v));
        const int64_t most = min_of<int64_t>(pairs, INT32_MAX / ranks);
        return static_cast<int>(clamp_to<int64_t>(bytes / pair_bytes, 1, most));
    }
};

}  // namespace hstu::attention::sm80
