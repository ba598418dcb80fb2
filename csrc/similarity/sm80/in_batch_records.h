// What the in-batch softmax asks of a query and of an item besides their rows, 16 bytes each, made once for the forward
// and the backward.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "similarity/params.h"

namespace hstu::similarity::sm80 {

// Ids and sequences are numbers, equal where the ids are.
struct alignas(16) QueryRecord {
    int positive_id, sequence, positive;  // sequence -1: none
    float scale;                          // 1 / (max(norm, eps) temperature)
};
struct alignas(16) ItemRecord {
    int id, sequence;      // sequence -2: none
    float log_q, inverse;  // inverse: 1 / max(norm, eps)
};

__host__ __device__ __forceinline__ bool is_masked(const QueryRecord& query, const ItemRecord& item) {
    return query.positive_id == item.id || query.sequence == item.sequence;
}

struct InBatchRecords {
    int64_t queries, items, dim;
    float inverse_temperature, inverse_eps;
    Matrix query, item;              // T [T, D] [X, D]
    const int64_t* positives;        // [T]: the positive's place among the items
    const int64_t* item_ids;         // [X]
    const int64_t* query_sequences;  // [T] or nullptr
    const int64_t* item_sequences;   // [X], with query_sequences
    const float* log_q;              // [X] or nullptr
    unsigned long long* slots;       // [slot_count], zeroed: which id has which number
    uint32_t slot_count;             // a power of two, at least twice the ids
    QueryRecord* query_records;      // [T], written
    ItemRecord* item_records;        // [X], written
};

void in_batch_records(const InBatchRecords& p, DType dtype, int device, void* stream);

}  // namespace hstu::similarity::sm80
