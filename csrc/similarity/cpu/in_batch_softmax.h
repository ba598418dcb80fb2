// One row of a tile of the in-batch softmax. similarity holds s_ij of unit queries and items, from a matrix product:
//
//     l_ij = s_ij / temperature - log_q[j]       over the positive and every item j that is kept as a negative
//     loss_i = log sum_j exp(l_ij) - l_i,positive
//
// Forward keeps a running maximum and sum of exponentials; backward turns the tile into the gradient of s_ij.
#pragma once

#include "similarity/cpu/rows.h"

namespace hstu::similarity::cpu::HSTU_CPU_VARIANT {

// logits[j] of the tile's columns, -inf where masked.
template <class C>
static void in_batch_logits(const InBatchParams& p, int64_t row, C* logits) {
    const int64_t t = p.row0 + row, positive = p.positives[t], positive_id = p.item_ids[positive];
    const C* const similarity = row_of<const C>(p.similarity, row);
    const int64_t* const ids = p.item_ids + p.col0;
    const C inv_temperature = static_cast<C>(p.inv_temperature), masked = -__builtin_inf();
    for (int64_t j = 0; j < p.cols; ++j) logits[j] = ids[j] == positive_id ? masked : similarity[j] * inv_temperature;
    if (p.log_q) {
        const C* const log_q = static_cast<const C*>(p.log_q) + p.col0;
        for (int64_t j = 0; j < p.cols; ++j) logits[j] -= log_q[j];
    }
    if (p.query_sequences) {
        const int64_t sequence = p.query_sequences[t];
        const int64_t* const sequences = p.item_sequences + p.col0;
        for (int64_t j = 0; j < p.cols; ++j) logits[j] = sequences[j] == sequence ? masked : logits[j];
    }
    if (p.duplicate.data) {
        const C* const duplicate = row_of<const C>(p.duplicate, row);
        const C threshold = static_cast<C>(p.threshold);
        for (int64_t j = 0; j < p.cols; ++j) logits[j] = duplicate[j] > threshold ? masked : logits[j];
    }
    const int64_t j = positive - p.col0;
    if (j >= 0 && j < p.cols)
        logits[j] = similarity[j] * inv_temperature - (p.log_q ? static_cast<const C*>(p.log_q)[positive] : C(0));
}

template <class C>
static void in_batch_forward_row(const InBatchParams& p, int64_t row, void* memory) {
    C* const logits = Scratch(memory).take<C>(p.cols);
    in_batch_logits(p, row, logits);
    const int64_t t = p.row0 + row, place = p.positives[t] - p.col0;
    if (place >= 0 && place < p.cols) static_cast<C*>(p.positive_logit)[t] = logits[place];

    C& maximum = static_cast<C*>(p.maximum)[t];
    C& sum = static_cast<C*>(p.sum)[t];
    const C tile_maximum = maximum_of(logits, p.cols);
    if (tile_maximum > maximum) {
        sum *= exponential(maximum - tile_maximum);
        maximum = tile_maximum;
    }
    // Until something is kept the terms are 0, whatever the shift; a NaN still gets into the sum.
    sum += exp_shifted(logits, maximum == -__builtin_inf() ? C(0) : maximum, p.cols);
}

template <class C>
static void in_batch_backward_row(const InBatchParams& p, int64_t row, void* memory) {
    C* const logits = Scratch(memory).take<C>(p.cols);
    in_batch_logits(p, row, logits);
    const int64_t t = p.row0 + row, place = p.positives[t] - p.col0;
    const C scale = static_cast<const C*>(p.dloss)[t] * static_cast<C>(p.inv_temperature);
    exp_shifted(logits, static_cast<const C*>(p.lse)[t], p.cols);
    if (place >= 0 && place < p.cols) logits[place] -= C(1);
    C* const gradient = row_of<C>(p.similarity, row);
    for (int64_t j = 0; j < p.cols; ++j) gradient[j] = logits[j] * scale;
}

}  // namespace hstu::similarity::cpu::HSTU_CPU_VARIANT
