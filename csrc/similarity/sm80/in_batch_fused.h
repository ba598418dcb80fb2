// The in-batch softmax in half precision on the GPU, fused with its matrix products: no logits in memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "similarity/sm80/in_batch_records.h"

namespace hstu::similarity::sm80 {

struct InBatchFused {
    int64_t queries, items, dim;
    Matrix query, item;                // T [T, D] [X, D]: the rows, backward: of unit length
    const QueryRecord* query_records;  // [T]
    const ItemRecord* item_records;    // [X]
    float inv_temperature;
    float* maximum;         // [splits, T]
    float* sum;             // [splits, T]
    float* positive_logit;  // [T]
    float* loss;            // [T], written by the forward like lse
    float* lse;             // [T]
    const float* dloss;     // [T], backward only
    float* gradient;        // [T or X, D], added to: of unit queries, or of unit items
    int splits, device;
};

// Blocks along the other side of the products, so that the last round of blocks is nearly full; 0: this D or GPU has no
// fused kernel.
int in_batch_splits(int64_t rows, int64_t others, int64_t dim, int device);
void in_batch_fused_forward(const InBatchFused& p, DType dtype, void* stream);
// of_items: the gradient of the items, else of the queries.
void in_batch_fused_backward(const InBatchFused& p, DType dtype, bool of_items, void* stream);

}  // namespace hstu::similarity::sm80
