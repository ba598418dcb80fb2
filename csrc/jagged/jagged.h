// Copies between packed sequences of rows: several parts and their concatenation or interleaving, jagged and dense.
// A row is any number of contiguous bytes, so one kernel serves every dtype and the copies are exact.
#pragma once

#include <cstdint>
#include <vector>

#include "common/execution.h"
#include "common/index_array.h"
#include "common/tensor.h"

namespace hstu::jagged {

constexpr int kMaxParts = 256;

// How the parts of a sequence lie in the joined rows: one after the other, or the first row of each, the second ...
enum class Order { kConcat, kInterleave };

// Rows of row_bytes contiguous bytes each.
struct Rows {
    char* data;  // [count, row_bytes]
    int64_t count;
    int64_t stride;  // bytes from one row to the next
};

struct Part {
    Rows rows;
    IndexArray offsets;  // [batch + 1]
};

// Sequence b has rows [offsets[b], offsets[b + 1]) of every part and, joined, [sum offsets[b], sum offsets[b + 1]).
// Rows outside of all sequences become 0 where they are written.
struct JoinParams {
    Order order;
    bool split;  // from the joined rows to the parts
    int part_count;
    int64_t batch;
    int64_t row_bytes;
    Rows joined;
    void* joined_offsets;  // [batch + 1], written: sum over the parts. nullptr for a split on a GPU
    bool offsets_are_int64;
    int num_threads;
    std::vector<Part> parts;
};

// Row t of sequence b is jagged row offsets[b] + t and dense row (b, t). Dense rows past the sequence become padding;
// jagged rows past max_len, or outside of all sequences, become 0.
struct DenseParams {
    bool to_jagged;
    int64_t batch, max_len;
    int64_t row_bytes;
    Rows jagged;
    IndexArray offsets;                  // [batch + 1]
    char* dense;                         // [batch, max_len, row_bytes]
    int64_t batch_stride, dense_stride;  // bytes
    uint64_t padding;                    // the bits of one element, repeated to 8 bytes
    int num_threads;
};

struct JoinInputs {
    const char* op;
    Order order;
    bool split;
    Tensor joined;                       // [rows, ...]
    Tensor joined_offsets;               // [batch + 1], written; none for a split
    std::vector<Tensor> parts, offsets;  // [rows, ...] and [batch + 1] each, as many of both
};

struct DenseInputs {
    const char* op;
    bool to_jagged;
    Tensor dense;     // [batch, max_len, ...]
    Tensor values;    // [rows, ...]
    Tensor offsets;   // [batch + 1]
    int64_t padding;  // the bits of one element
};

// The end of the last sequence and the length of the longest one.
struct Sizes {
    int64_t end, longest;
};

void check_part_count(const char* op, const char* name, int64_t count);
void check_offsets_count(const char* op, int64_t parts, int64_t count);

void join(const JoinInputs& inputs, Execution execution);
void dense(const DenseInputs& inputs, Execution execution);

// Of checked offsets on the CPU that must end within `rows`.
Sizes sizes(const char* op, const char* name, int index, const Tensor& offsets, int64_t rows);

namespace cpu {
void join(const JoinParams& p);
void dense(const DenseParams& p);
}  // namespace cpu

// Enqueued on the stream. What offsets hold is not checked, and nothing outside of the tensors is read or written.
namespace cuda {
void join(const JoinParams& p, int device, void* stream);
void dense(const DenseParams& p, int device, void* stream);
}  // namespace cuda

}  // namespace hstu::jagged
