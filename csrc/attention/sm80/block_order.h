// In which order thread blocks take up the work of a launch.
#pragma once

#include "common/cuda_launch.h"
#include "common/fast_divisor.h"

namespace hstu::attention::sm80 {

// Blocks are numbered so that those with most work under a causal mask come first, across a group of (sequence, head)
// pairs: a few rounds of all multiprocessors, so that light blocks are left for the end, and yet few enough that what
// the group reads again and again stays in the L2 cache.
struct BlockOrder {
    static constexpr int kRounds = 4;

    struct Place {
        int b, head;
        int rank;  // 0 is the heaviest block of its (sequence, head)
    };

    int group, pairs;               // (sequence, head) pairs of a group and in all
    FastDivisor by_group, by_heads;  // by the blocks of a group

    // ranks: blocks along a sequence; resident: blocks that run at the same time on one multiprocessor.
    BlockOrder(const Params& p, int ranks, int resident)
        : group(group_size(p, ranks, resident)), pairs(p.heads * p.batch), by_group(group * ranks), by_heads(p.heads) {}

    HSTU_HOST_DEVICE Place operator[](int block) const {
        const auto [number, index] = by_group.divide(block);
        const int size = min_of(group, pairs - number * group), rank = index / size;
        const auto [b, head] = by_heads.divide(number * group + index - rank * size);
        return {b, head, rank};
    }

  private:
    static int group_size(const Params& p, int ranks, int resident) {
        const int wanted = ceil_div(kRounds * resident * multiprocessors(p.device), ranks);
        const int groups = max_of(1, p.heads * p.batch / wanted);
        return ceil_div(p.heads * p.batch, groups);
    }
};

}  // namespace hstu::attention::sm80
