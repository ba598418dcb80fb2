// Sampled softmax of one query row t against its positive (j = 0) and its K negatives, items read from the table in place:
//
//     s_j = (q / |q|) . (e_j / |e_j|)       l_j = s_j / temperature - log_q[item j], -5e4 for a negative that is the positive
//     loss = log sum_j exp(l_j) - l_0       w_j = dloss (exp(l_j - lse) - [j = 0]) / temperature, 0 where masked
//     dq = (sum_j w_j e_j / |e_j| - q / |q| sum_j w_j s_j) / |q|        and the same for every item with q and e swapped
//
// The gradient of an item sums over the places where it was drawn, in the order of the places: no number of threads
// changes a bit.
#pragma once

#include "similarity/cpu/rows.h"

namespace hstu::similarity::cpu::HSTU_CPU_VARIANT {

constexpr int kAhead = 4;  // rows of the table that are on their way while one is worked on

template <class T>
HSTU_CPU_INLINE void prefetch_row(const T* row, int64_t dim) {
    const char* const bytes = reinterpret_cast<const char*>(row);
    for (int64_t offset = 0; offset < dim * static_cast<int64_t>(sizeof(T)); offset += 64)
        __builtin_prefetch(bytes + offset);
}

template <class T>
HSTU_CPU_INLINE void prefetch_item(const SampledParams& p, int64_t t, int64_t j) {
    if (j <= p.samples) prefetch_row(row_of<const T>(p.table, p.item(t, j)), p.dim);
}

// logits[0 .. K]; a masked one is -5e4.
template <class C>
static void sampled_logits(const SampledParams& p, int64_t t, const C* similarity, C* logits) {
    const C inv_temperature = static_cast<C>(p.inv_temperature);
    const C* const log_q = static_cast<const C*>(p.log_q);
    const int64_t positive = p.positive[t];
    for (int64_t j = 0; j <= p.samples; ++j) {
        const int64_t item = p.item(t, j);
        const C logit = similarity[j] * inv_temperature - (log_q ? log_q[item] : C(0));
        logits[j] = j > 0 && item == positive ? C(-5e4) : logit;
    }
}

template <class T>
static void sampled_forward_row(const SampledParams& p, int64_t t, void* memory) {
    using C = Compute<T>;
    Scratch scratch(memory);
    C* const query_buffer = scratch.take<C>(p.dim);
    C* const item_buffer = scratch.take<C>(p.dim);
    C* const logits = scratch.take<C>(p.samples + 1);
    C* const similarity = static_cast<C*>(p.similarity) + t * (p.samples + 1);
    const C* const query = as_compute(row_of<const T>(p.query, t), p.dim, query_buffer);
    const Norm<C> query_norm(dot(query, query, p.dim), p.eps);

    for (int64_t j = 0; j < kAhead; ++j) prefetch_item<T>(p, t, j);
    for (int64_t j = 0; j <= p.samples; ++j) {
        prefetch_item<T>(p, t, j + kAhead);
        const C* item = as_compute(row_of<const T>(p.table, p.item(t, j)), p.dim, item_buffer);
        C product, square;
        dot_and_square(query, item, p.dim, product, square);
        similarity[j] = product * query_norm.inverse * Norm<C>(square, p.eps).inverse;
    }
    sampled_logits(p, t, similarity, logits);
    const C positive_logit = logits[0], maximum = maximum_of(logits, p.samples + 1);
    const C lse = maximum + logarithm(exp_shifted(logits, maximum, p.samples + 1));
    static_cast<C*>(p.lse)[t] = lse;
    static_cast<C*>(p.loss)[t] = lse - positive_logit;
}

template <class T>
static void sampled_backward_query_row(const SampledBackwardParams& p, int64_t t, void* memory) {
    using C = Compute<T>;
    Scratch scratch(memory);
    C* const query_buffer = scratch.take<C>(p.dim);
    C* const item_buffer = scratch.take<C>(p.dim);
    C* const sum = scratch.take<C>(p.dim);
    const int64_t count = p.samples + 1;
    const C* const similarity = static_cast<const C*>(p.similarity) + t * count;
    C* const weight = static_cast<C*>(p.weight) + t * count;

    const int64_t positive = p.positive[t];
    const C scale = static_cast<const C*>(p.dloss)[t] * static_cast<C>(p.inv_temperature);
    sampled_logits(p, t, similarity, weight);
    exp_shifted(weight, static_cast<const C*>(p.lse)[t], count);
    weight[0] = (weight[0] - C(1)) * scale;
    for (int64_t j = 1; j < count; ++j) weight[j] = p.item(t, j) == positive ? C(0) : weight[j] * scale;

    const C* const query = as_compute(row_of<const T>(p.query, t), p.dim, query_buffer);
    const Norm<C> query_norm(dot(query, query, p.dim), p.eps);
    C* const unit = static_cast<C*>(p.unit_query) + t * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) unit[d] = query[d] * query_norm.inverse;
    if (!p.dquery.data) return;

    for (int64_t d = 0; d < p.dim; ++d) sum[d] = 0;
    for (int64_t j = 0; j < kAhead; ++j) prefetch_item<T>(p, t, j);
    for (int64_t j = 0; j < count; ++j) {
        prefetch_item<T>(p, t, j + kAhead);
        const C* item = as_compute(row_of<const T>(p.table, p.item(t, j)), p.dim, item_buffer);
        add_scaled(item, weight[j] * Norm<C>(dot(item, item, p.dim), p.eps).inverse, p.dim, sum);
    }
    const C along = query_norm.clamped ? C(0) : -dot(weight, similarity, count) * query_norm.inverse;
    store_sum(sum, query_norm.inverse, unit, along, p.dim, row_of<T>(p.dquery, t));
}

template <class T>
static void sampled_backward_table_row(const SampledBackwardParams& p, int64_t entry, void* memory) {
    using C = Compute<T>;
    const int64_t id = p.ids ? p.ids[entry] : entry;
    const int64_t begin = p.starts[id], end = p.starts[id + 1], count = p.samples + 1;
    if (begin == end) return;  // dtable was zeroed by the caller
    Scratch scratch(memory);
    C* const item_buffer = scratch.take<C>(p.dim);
    C* const sum = scratch.take<C>(p.dim);
    const C* const similarity = static_cast<const C*>(p.similarity);
    const C* const weight = static_cast<const C*>(p.weight);
    const C* const unit_query = static_cast<const C*>(p.unit_query);

    for (int64_t d = 0; d < p.dim; ++d) sum[d] = 0;
    C product = 0;
    for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < end) {
            const int64_t next = p.order[i + kAhead];
            prefetch_row(unit_query + next / count * p.dim, p.dim);
            __builtin_prefetch(weight + next);
            __builtin_prefetch(similarity + next);
        }
        const int64_t place = p.order[i];
        add_scaled(unit_query + place / count * p.dim, weight[place], p.dim, sum);
        product += weight[place] * similarity[place];
    }
    const C* item = as_compute(row_of<const T>(p.table, id), p.dim, item_buffer);
    const Norm<C> norm(dot(item, item, p.dim), p.eps);
    const C along = norm.clamped ? C(0) : -product * norm.inverse * norm.inverse;
    store_sum(sum, norm.inverse, item, along, p.dim, row_of<T>(p.dtable, entry));
}

}  // namespace hstu::similarity::cpu::HSTU_CPU_VARIANT
