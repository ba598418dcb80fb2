// In which order thread blocks take up the work of a launch.
#pragma once

#include "attention/params.h"
#include "common/fast_divisor.h"
#include "common/host_device.h"

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

    int group, pairs;                // (sequence, head) pairs of a group and in all
    FastDivisor by_group, by_heads;  // by the blocks of a group

    // ranks: blocks along a sequence; resident: blocks that the GPU runs at the same time.
    BlockOrder(const Params& p, int ranks, int resident)
        : group(group_size(p.heads * p.batch, ranks, resident)), pairs(p.heads * p.batch), by_group(group * ranks),
          by_heads(p.heads) {}

    HSTU_HOST_DEVICE Place operator[](int block) const {
        const auto [number, index] = by_group.divide(block);
        const int size = min_of(group, pairs - number * group), rank = index / size;
        const auto [b, head] = by_heads.divide(number * group + index - rank * size);
        return {b, head, rank};
    }

  private:
    static int group_size(int pairs, int ranks, int resident) {
        const int wanted = ceil_div(kRounds * resident, ranks);
        return max_of(1, ceil_div(pairs, max_of(1, pairs / wanted)));
    }
};

}  // namespace hstu::attention::sm80
