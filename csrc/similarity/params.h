// What the similarity kernels take. Plain data with a shape on every pointer; C is the compute type, double where the
// tensors are float64 and float otherwise.
#pragma once

#include <cstdint>

#include "common/index_array.h"

namespace hstu::similarity {

struct Matrix {
    void* data = nullptr;  // [rows, dim], contiguous in dim
    int64_t stride = 0;    // between rows, in elements
};

struct L2NormParams {
    int64_t rows, dim;
    double eps;
    Matrix x;     // [rows, dim]
    Matrix dout;  // [rows, dim], backward only
    Matrix out;   // [rows, dim]: x / max(|x|, eps), backward: the gradient of x
    int num_threads;
};

// One tile of scores is merged into what every row has kept so far.
struct TopkParams {
    int64_t rows, k;
    int64_t cols, col0;               // of the tile: scores[i, j] belongs to item col0 + j
    int64_t capacity;                 // more than k, or the number of items
    bool is_double;                   // C
    Matrix scores;                    // C [rows, cols]
    void* kept;                       // Candidate<C> [rows, capacity], 16 bytes each
    int64_t* counts;                  // [rows]
    void* thresholds;                 // C [rows]: a score must be above it
    const int64_t* excluded;          // item indices, ascending within a row; or nullptr
    const int64_t* excluded_offsets;  // [rows + 1]
    const bool* valid;                // [items] or nullptr
    Matrix values;                    // C [rows, k]
    int64_t* indices;                 // [rows, k]
    int num_threads;
};

struct SampledParams {
    int64_t rows, samples, items, dim;  // T, K, V, D
    double inv_temperature, eps;
    Matrix query;         // [T, D]
    Matrix table;         // [V, D]
    IndexArray positive;  // [T]
    IndexArray negative;  // [T, K]
    const void* log_q;    // C [V] or nullptr
    void* similarity;     // C [T, K + 1], the positive first
    void* lse;            // C [T]
    void* loss;           // C [T]
    int num_threads;

    HSTU_HOST_DEVICE int64_t item(int64_t t, int64_t j) const {
        return j == 0 ? positive[t] : negative[t * samples + j - 1];
    }
    // As GPU kernels, which cannot refuse an id, take it: one outside of the table stands for the nearest inside.
    HSTU_HOST_DEVICE int inside(int64_t id) const { return static_cast<int>(clamp_to<int64_t>(id, 0, items - 1)); }
};

struct SampledBackwardParams : SampledParams {
    const void* dloss;      // C [T]
    void* weight;           // C [T, K + 1]: the gradient of every similarity
    void* unit_query;       // C [T, D]: the normalised query
    Matrix dquery;          // [T, D] or nullptr
    Matrix dtable;          // [V or entries, D]: row i is the gradient of item ids[i], or of item i
    const int64_t* ids;     // [entries] or nullptr
    int64_t entries;        // rows of dtable
    const int64_t* starts;  // [V + 1]: the pairs of item v are order[starts[v]] ... order[starts[v + 1] - 1]
    const int64_t* order;   // [T * (K + 1)]: t * (K + 1) + j, ascending within an item
};

// A forward on a GPU, where C is float: instead of similarity and lse it writes the gradients of every loss.
struct SampledForwardParams : SampledParams {
    float* dquery;       // [T, D]: of loss[t] with respect to query t
    float* dsimilarity;  // [T, K + 1]: of loss[t] with respect to similarity j, over max(|query t|, eps)
};

// The gradient of the table on a GPU, from the pairs (t, j) sorted by item.
struct SampledTableParams : SampledParams {
    const float* dloss;         // [T]
    const float* dsimilarity;   // [T, K + 1], as above
    int64_t pairs;              // T * (K + 1), below 2^31
    const int32_t* pair_items;  // [pairs], ascending
    const uint32_t* order;      // [pairs]: t * (K + 1) + j, ascending within an item
    const int64_t* pair_rows;   // [pairs]: the item's row of dtable; or nullptr, then it is the item
    const int64_t* row_items;   // [table_rows]: the item of a row of dtable; or nullptr, then it is the row
    int64_t chunk;              // pairs that a warp adds up
    float* partial;             // [2 * chunks, D]: sums of items that do not lie in one chunk
    float* sums;                // [table_rows, D], zeroed; where dtable is float, its memory
    Matrix dtable;              // [table_rows, D]
    int64_t table_rows;
};

// One tile of similarities of unit rows: queries [row0, row0 + rows) against items [col0, col0 + cols).
struct InBatchParams {
    int64_t rows, cols, row0, col0, items;  // items: X
    bool is_double;                         // C
    double inv_temperature, threshold;
    Matrix similarity;               // C [rows, cols]; backward: becomes its gradient
    Matrix duplicate;                // C [rows, cols]: similarity of the positive item with item j; or nullptr
    const int64_t* positives;        // [T]: the positive's place among the items
    const int64_t* item_ids;         // [X]
    const int64_t* query_sequences;  // [T] or nullptr
    const int64_t* item_sequences;   // [X], with query_sequences
    const void* log_q;               // C [X] or nullptr
    const void* query_records;       // QueryRecord [T] and ItemRecord [X], on a GPU: in place of what is above, for
    const void* item_records;        // similarities that are products of rows as they are
    void* maximum;                   // C [T], running maximum of the logits
    void* sum;                       // C [T], running sum of exp(logit - maximum)
    void* positive_logit;            // C [T]
    const void* lse;                 // C [T], backward only
    const void* dloss;               // C [T], backward only
    int num_threads;
};

}  // namespace hstu::similarity
