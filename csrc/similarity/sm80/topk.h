// Exact top-k of dot products on the GPU, without the matrix of scores (compute capability 8.0 and later).
//
// Items are taken in rounds. A round appends every item whose score beats the row's threshold to the row's candidates,
// and a block per row then keeps the best k and makes the k-th the new threshold. Where a round's candidates do
// not fit, the row's block goes through the round again item by item, so the result is exact whatever the order.
//
// A candidate is a 64-bit key: the score as an unsigned integer of the same order, then the complement of the item's
// index. Keys are distinct, a larger key is a better candidate, and ties go to the lower index.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

constexpr int kTopkMaxK = 2048;
constexpr int kTopkTileItems = 128;

// Room for candidates: the k that are kept and several times as many that may come.
constexpr int topk_capacity(int64_t k) { return k <= 512 ? 4096 : 8192; }

struct TopkScan {
    int64_t rows, items, dim;         // B, N < 2^32, D
    int k, capacity;                  // k <= kTopkMaxK
    Matrix query, catalogue;          // T [B, D] [N, D], half precision, rows aligned to 16 bytes
    uint64_t* thresholds;             // [B]: a candidate must be above it
    int* counts;                      // [B]: candidates offered; past the capacity they are dropped
    int* kept;                        // [B]: how many the last selection kept
    uint64_t* keys;                   // [B, capacity]
    const int64_t* excluded;          // item indices, ascending within a row; or nullptr
    const int64_t* excluded_offsets;  // [B + 1]
    int64_t excluded_count;
    const bool* valid;  // [N] or nullptr
    float* values;      // [B, k]
    int64_t* indices;   // [B, k]
    int device;
};

// A tile of scores that a matrix product wrote: fp32 [B, cols], of items [col0, col0 + cols).
struct TopkScores {
    Matrix scores;
    int64_t col0, cols;
};

// Items of the round after `done` of them, whole tiles: as few rounds as can be, each growing by the same factor. Growing by
// g brings k (g - 1) new candidates, with a deviation of a share 1 / sqrt(k); they must fit, and where many queries share
// the time of a round, the cost of one more candidate for each is more than that of a further round.
int64_t topk_round(int64_t items, int64_t done, int64_t k, int64_t rows);

// Rows of the tile of queries that the fused scan would use, 0 where this D does not fit or is not aligned.
int topk_scan_rows(const TopkScan& p);
// All rounds and the result. thresholds, counts, kept and keys are scratch, one behind the other.
void topk_scan(const TopkScan& p, DType dtype, void* stream);
// The rounds of a tile of scores; those of the last one write the result. Tiles come in order, the first at column 0.
void topk_merge(const TopkScan& p, const TopkScores& tile, bool last, void* stream);

}  // namespace hstu::similarity::sm80
