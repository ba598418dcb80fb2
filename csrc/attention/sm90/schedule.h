// Which work a block of the persistent grid takes up, and when.
//
// A level is a row block's number within its sequence: under a causal mask, what it costs. Places number all row blocks of
// all (sequence, head) pairs from heavy to light: sequences by falling number of row blocks, `chunk` levels at a time,
// from the top; a pair's row blocks of one chunk are neighbours, so that they find each other's keys and values in the
// L2 cache. Blocks take places to and fro (0 1 2 .. 2 1 0 0 1 2 ..): with falling costs every block gets the same sum to
// within a few per cent, and nothing has to be counted while the kernel runs.
#pragma once

#include "attention/gpu.h"

namespace hstu::attention::sm90 {

struct Schedule {
    static constexpr int kMaxSequences = 384, kMaxLevels = 256;  // of a batch that is sorted; others go as they come

    int batch, heads, levels, chunk;
    bool of_keys;  // the rows are keys, as in the backward, not queries
    bool sorted;   // sequences differ in length

    // rows: of a row block; blocks: of the grid.
    Schedule(const Params& p, int rows, int blocks, bool of_keys = false)
        : batch(p.batch), heads(p.heads), levels(max_of(1, ceil_div(of_keys ? p.max_seqlen_k : p.max_seqlen_q, rows))),
          of_keys(of_keys) {
        // As many blocks as share a pair's keys at a time anyway, or four.
        chunk = blocks >= int64_t{6} * batch * heads ? 1 : 4;
        const bool equal = of_keys ? !p.seqused_k && p.total_k == int64_t{p.batch} * p.max_seqlen_k
                                   : !p.seqused_q && p.total_q == int64_t{p.batch} * p.max_seqlen_q;
        sorted = !equal && levels > 1 && batch <= kMaxSequences && levels <= kMaxLevels;
    }
    int64_t places() const { return int64_t{levels} * heads * batch; }

    // The place that block `block` of `blocks` takes in its round `round`.
    HSTU_HOST_DEVICE static int place(int round, int block, int blocks) {
        return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    }
};

// The batch's sequences by falling number of row blocks, in shared memory.
struct SortedBatch {
    int blocks_from[Schedule::kMaxLevels + 1];  // [r]: row blocks, of one head, of level r and above
    uint16_t sequences[Schedule::kMaxSequences];

    struct Scratch {
        int next[Schedule::kMaxLevels + 1];  // [n]: where the next sequence with n row blocks goes
        uint16_t row_blocks[Schedule::kMaxSequences];
    };

    // By one warp. Counting sort, stable, so that every block of the grid comes to the same order.
    __device__ void sort(const Params& p, int rows, int levels, bool of_keys, Scratch& scratch) {
        for (int n = lane(); n <= levels; n += 32) scratch.next[n] = 0;
        __syncwarp();
        for (int b = lane(); b < p.batch; b += 32) {
            const Sequence seq(p, b);
            const int n = min_of(levels, ceil_div(of_keys ? seq.len_k : seq.len_q, rows));
            scratch.row_blocks[b] = static_cast<uint16_t>(n);
            atomicAdd(&scratch.next[n], 1);
        }
        __syncwarp();
        // Downwards from the top: sequences with more than n row blocks, and row blocks of level n and above.
        int longer = 0, blocks = 0;
        for (int top = levels; top >= 0; top -= 32) {
            const int n = top - lane();
            const int count = n >= 0 ? scratch.next[n] : 0;
            int up_to = count;  // this lane's and the lanes' before it
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(0xffffffff, up_to, step);
                if (lane() >= step) up_to += other;
            }
            const int above = longer + up_to - count;
            int sum = above;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(0xffffffff, sum, step);
                if (lane() >= step) sum += other;
            }
            if (n >= 0) scratch.next[n] = above, blocks_from[n] = blocks + sum;
            longer += __shfl_sync(0xffffffff, up_to, 31);
            blocks += __shfl_sync(0xffffffff, sum, 31);
        }
        __syncwarp();
        for (int first = 0; first < p.batch; first += 32) {
            const int b = first + lane();
            const int n = b < p.batch ? scratch.row_blocks[b] : -1;
            const unsigned same = __match_any_sync(0xffffffff, n), before = same & ((1u << lane()) - 1);
            const int place = n >= 0 ? scratch.next[n] + __popc(before) : 0;
            __syncwarp();
            if (n >= 0) {
                sequences[place] = static_cast<uint16_t>(b);
                if (before == 0) scratch.next[n] += __popc(same);
            }
            __syncwarp();
        }
    }
};

// A lane's way through the places, fastest where they only rise or only fall.
struct PlaceFinder {
    const Schedule& schedule;
    const SortedBatch& batch;  // where schedule.sorted
    int top;                   // highest level of the chunk reached

    struct Rows {
        int b, head, level;  // level < 0: behind the last place
    };

    HSTU_HOST_DEVICE PlaceFinder(const Schedule& schedule, const SortedBatch& batch)
        : schedule(schedule), batch(batch), top(schedule.levels - 1) {}

    HSTU_HOST_DEVICE int blocks_from(int level) const {
        return schedule.sorted ? batch.blocks_from[level] : (schedule.levels - level) * schedule.batch;
    }
    HSTU_HOST_DEVICE int last() const { return blocks_from(0) * schedule.heads; }

    HSTU_HOST_DEVICE Rows operator()(int place) {
        const int heads = schedule.heads;
        if (place >= last()) return {0, 0, -1};
        while (top < schedule.levels - 1 && place < blocks_from(top + 1) * heads) top += schedule.chunk;
        int low = max_of(0, top - schedule.chunk + 1);
        while (place >= blocks_from(low) * heads) {
            top = low - 1;
            low = max_of(0, top - schedule.chunk + 1);
        }
        // First the pairs that have all the chunk's levels, then the others level by level.
        const int above = blocks_from(top + 1), whole = blocks_from(top) - above, size = top - low + 1;
        place -= above * heads;
        int pair = place / size, level = top - place % size, skipped = 0;
        if (place >= whole * heads * size) {
            place -= whole * heads * size;
            for (level = top - 1;; --level) {
                const int pairs = (blocks_from(level) - blocks_from(level + 1) - whole) * heads;
                if (place < pairs) break;
                place -= pairs;
            }
            pair = place, skipped = whole;
        }
        const int index = skipped + pair / heads;
        return {schedule.sorted ? batch.sequences[index] : index, pair % heads, level};
    }
};

}  // namespace hstu::attention::sm90
