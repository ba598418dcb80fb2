// The similarity ops as Python calls them. An undefined tensor was None. The parts of an op that are matrix products run
// in torch between these calls, so an op of several steps has one check_ function, called once, and steps that trust it.
#pragma once

#include <cstdint>

#include "common/execution.h"
#include "common/tensor.h"

namespace hstu::similarity {

// Before a matrix on the CPU, contiguous in rows, is written for the first time (common/huge_pages.h).
void advise_huge_pages(const Tensor& out);

void l2norm(const Tensor& x, const Tensor& out, double eps, Execution execution);
// On a GPU dout may be float32 where x is narrower.
void l2norm_backward(const Tensor& dout, const Tensor& x, const Tensor& dx, double eps, Execution execution);

void check_l2norm_dot(const Tensor& q, const Tensor& items, double eps);

struct TopkInputs {
    Tensor query, items;  // [B, D] [N, D]
    int64_t k;
    Tensor exclude, exclude_offsets;  // [B, E], or [total] with [B + 1]; or undefined
    Tensor valid;                     // [N] or undefined
};

struct TopkTile {
    Tensor scores;  // C [rows, cols]
    int64_t col0;
    Tensor kept, counts, thresholds;    // int64 [rows, 2 * capacity], int64 [rows], C [rows]
    Tensor excluded, excluded_offsets;  // int64, sorted in every row; or undefined
    Tensor valid;
    int64_t k;
};

// Of the GPU: candidates (similarity/sm80/topk.h) and the result.
struct TopkState {
    Tensor scratch;          // int64 [rows * (capacity + 2)]
    Tensor values, indices;  // fp32 [rows, k], int64 [rows, k]
};

void check_topk_dot(const TopkInputs& inputs);
void topk_merge(const TopkTile& tile, int num_threads);
void topk_finish(const Tensor& kept, const Tensor& counts, const Tensor& values, const Tensor& indices,
                 int num_threads);

// Candidates that the GPU has room for, 0 where k is too large for it.
int64_t topk_capacity(int64_t k);
// The whole result; inputs.exclude is sorted within rows and inputs.exclude_offsets given. False, and nothing done, where
// it does not serve these rows: half precision, aligned to 16 bytes, not too long.
bool topk_scan(const TopkInputs& inputs, const TopkState& state, Execution execution);
// The same over fp32 scores [rows, cols] of items [col0, col0 + cols), from the first to the last, which writes the result.
void topk_merge_scores(const TopkInputs& inputs, const Tensor& scores, int64_t col0, bool last, const TopkState& state,
                       Execution execution);

struct SampledInputs {
    Tensor query, table;      // [T, D] [V, D]
    Tensor pos_ids, neg_ids;  // [T] [T, K]
    double temperature, eps;
    Tensor log_q;  // C [V] or undefined
};

struct SampledGradients {
    Tensor dloss, lse, similarity;  // C [T] [T] [T, K + 1], read
    Tensor weight, unit_query;      // C [T, K + 1] [T, D], scratch
    Tensor dquery;                  // [T, D], written; or undefined
};

// Two buffers each, int32 [pairs], and scratch, int64.
struct SampledPairs {
    Tensor items[2], order[2], scratch;
};

// A GPU's backward: from the pairs (t, j), sorted by item, and what the forward left of them.
struct SampledTableGradient {
    Tensor dloss, dsimilarity;     // float [T] [T, K + 1], read
    Tensor pair_items, order;      // int32 [pairs], ascending, and int32 [pairs]: t * (K + 1) + j
    Tensor pair_rows, row_items;   // int64 [pairs] [rows of dtable], for the rows of a sparse gradient; or undefined
    int64_t chunk;                 // pairs that are added up in one go
    Tensor partial, sums, dtable;  // float [2 * chunks, D], scratch; float like dtable, zeroed, may be dtable; written
};

// Of every row and of every pair it writes, on the CPU, the log-sum-exp [T] and the similarity [T, K + 1], and on a GPU
// loss[t]'s gradients: by query t [T, D], and by the similarities, over max(|query t|, eps), [T, K + 1].
void sampled_softmax_forward(const SampledInputs& in, const Tensor& loss, const Tensor& of_rows, const Tensor& of_pairs,
                             Execution execution);
// On a GPU only.
int64_t sampled_softmax_sort_bytes(int64_t pairs, int64_t items);
// Sorts all pairs by item; returns which of the buffers have them.
int sampled_softmax_sort(const SampledInputs& in, const SampledPairs& pairs, Execution execution);
void sampled_softmax_table(const SampledInputs& in, const SampledTableGradient& gradient, Execution execution);
// On the CPU only.
void sampled_softmax_group(const SampledInputs& in, const Tensor& starts, const Tensor& order);
void sampled_softmax_backward_query(const SampledInputs& in, const SampledGradients& gradients, int num_threads);
// `ids` [entries] gives the items of dtable's rows; undefined: every item of the table.
void sampled_softmax_backward_table(const SampledInputs& in, const SampledGradients& gradients, const Tensor& starts,
                                    const Tensor& order, const Tensor& ids, const Tensor& dtable, int num_threads);

struct InBatchInputs {
    Tensor query, items;                     // [T, D] [X, D]
    Tensor item_ids, positives;              // int64 [X] [T]
    Tensor sequence_ids, item_sequence_ids;  // int64 [T] [X], both or neither
    Tensor log_q;                            // C [X] or undefined
    double temperature;
    Tensor query_records, item_records;  // int32 [T, 4] [X, 4], on a GPU, where tiles hold dot products of rows
};

struct InBatchTile {
    Tensor similarity, duplicate;  // C [rows, cols]; duplicate or undefined
    int64_t row0, col0;
    double threshold;
};

void check_in_batch_softmax(const InBatchInputs& in, double eps);
// On a GPU: writes the records, see similarity/sm80/in_batch_records.h. slots: int64, zeroed, a power of two of them, at
// least twice as many as there are ids and sequences.
void in_batch_softmax_records(const InBatchInputs& in, double eps, const Tensor& slots, Execution execution);
void in_batch_softmax_forward(const InBatchInputs& in, const InBatchTile& tile, const Tensor& maximum,
                              const Tensor& sum, const Tensor& positive_logit, Execution execution);
// tile.similarity becomes its gradient; on a GPU in the dtype of the query, each row in the front of its own memory.
void in_batch_softmax_backward(const InBatchInputs& in, const InBatchTile& tile, const Tensor& dloss, const Tensor& lse,
                               Execution execution);

// In half precision on a GPU, fused with the products; see similarity/sm80/in_batch_fused.h.
struct InBatchShares {
    Tensor maximum, sum, positive_logit;  // fp32 [splits, T] [splits, T] [T], scratch
    Tensor loss, lse;                     // fp32 [T], written
};

// Splits of the other side for blocks of `rows`; 0: there is no fused kernel for these tensors.
int64_t in_batch_fused_splits(const Tensor& rows, const Tensor& others);
void in_batch_fused_forward(const InBatchInputs& in, const InBatchShares& shares, Execution execution);
// Adds to the gradient of the unit items, or of the unit queries; query and items are of unit length.
void in_batch_fused_backward(const InBatchInputs& in, const Tensor& dloss, const Tensor& lse, const Tensor& gradient,
                             bool of_items, int64_t splits, Execution execution);

}  // namespace hstu::similarity
