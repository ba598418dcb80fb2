#include "similarity/cpu/similarity.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "attention/cpu/attention.h"
#include "common/parallel.h"
#include "similarity/cpu/kernels.h"

namespace hstu::similarity::cpu {
namespace {

// The variant that the attention kernels run with.
const Kernels& select_kernels() {
#if defined(__x86_64__)
    const std::string name = attention::cpu::selected_variant();
    if (name == avx512_kernels().name) return avx512_kernels();
    if (name == avx2_kernels().name) return avx2_kernels();
#endif
    return baseline_kernels();
}

const Kernels& kernels() {
    static const Kernels& selected = select_kernels();
    return selected;
}

// body(begin, end, scratch) over all rows, in chunks; `row_work` multiply-adds a row decide whether waking the other
// threads is worth while.
template <class Body>
void over_rows(int64_t rows, int64_t row_work, int num_threads, int64_t bytes, const Body& body) {
    constexpr int64_t kWorthATeam = 200000, kChunkWork = 20000;
    constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(char* data) const { ::operator delete(data, kAlignment); }
    };
    const int threads = rows * row_work < kWorthATeam ? 1 : std::max(1, num_threads);
    const int64_t chunk = std::max<int64_t>(1, kChunkWork / std::max<int64_t>(1, row_work));
    bytes = (bytes + 63) / 64 * 64;
    const std::unique_ptr<char, Free> scratch(
        static_cast<char*>(::operator new(std::max<int64_t>(64, bytes * threads), kAlignment)));
    parallel_for((rows + chunk - 1) / chunk, threads, [&](int64_t i, int worker) {
        body(i * chunk, std::min(rows, (i + 1) * chunk), scratch.get() + worker * bytes);
    });
}

template <class C>
struct Candidate {
    C value;
    int64_t index;
};
static_assert(sizeof(Candidate<float>) == kCandidateBytes && sizeof(Candidate<double>) == kCandidateBytes,
              "as promised");

// Higher scores first, ties to the lower index.
template <class C>
bool before(const Candidate<C>& a, const Candidate<C>& b) {
    return a.value != b.value ? a.value > b.value : a.index < b.index;
}

int64_t first_above(const float* scores, int64_t begin, int64_t end, float threshold) {
    return kernels().first_above_float(scores, begin, end, threshold);
}
int64_t first_above(const double* scores, int64_t begin, int64_t end, double threshold) {
    return kernels().first_above_double(scores, begin, end, threshold);
}

// Items come in ascending order, so one that only equals the k-th best so far is after it: a score must be above.
template <class C>
void merge_row(const TopkParams& p, int64_t row) {
    const C* const scores = static_cast<const C*>(p.scores.data) + row * p.scores.stride;
    Candidate<C>* const kept = static_cast<Candidate<C>*>(p.kept) + row * p.capacity;
    const int64_t* const excluded_begin = p.excluded ? p.excluded + p.excluded_offsets[row] : nullptr;
    const int64_t* const excluded_end = p.excluded ? p.excluded + p.excluded_offsets[row + 1] : nullptr;
    C threshold = static_cast<C*>(p.thresholds)[row];
    int64_t count = p.counts[row];
    for (int64_t j = first_above(scores, 0, p.cols, threshold); j < p.cols;
         j = first_above(scores, j + 1, p.cols, threshold)) {
        const int64_t item = p.col0 + j;
        if ((p.valid && !p.valid[item]) || std::binary_search(excluded_begin, excluded_end, item)) continue;
        kept[count++] = {scores[j], item};
        if (count == p.capacity && count > p.k) {
            std::nth_element(kept, kept + p.k - 1, kept + count, before<C>);
            threshold = kept[p.k - 1].value;
            count = p.k;
        }
    }
    static_cast<C*>(p.thresholds)[row] = threshold;
    p.counts[row] = count;
}

template <class C>
void finish_row(const TopkParams& p, int64_t row) {
    Candidate<C>* const kept = static_cast<Candidate<C>*>(p.kept) + row * p.capacity;
    C* const values = static_cast<C*>(p.values.data) + row * p.values.stride;
    int64_t* const indices = p.indices + row * p.k;
    const int64_t found = std::min(p.counts[row], p.k);
    std::partial_sort(kept, kept + found, kept + p.counts[row], before<C>);
    for (int64_t i = 0; i < found; ++i) values[i] = kept[i].value, indices[i] = kept[i].index;
    std::fill(values + found, values + p.k, -std::numeric_limits<C>::infinity());
    std::fill(indices + found, indices + p.k, int64_t{-1});
}

}  // namespace

void l2norm(const L2NormParams& p, DType dtype) {
    over_rows(p.rows, 2 * p.dim, p.num_threads, scratch_bytes(p.dim, 0),
              [&](int64_t begin, int64_t end, void* scratch) { kernels().l2norm(p, dtype, begin, end, scratch); });
}

void l2norm_backward(const L2NormParams& p, DType dtype) {
    over_rows(
        p.rows, 3 * p.dim, p.num_threads, scratch_bytes(p.dim, 0),
        [&](int64_t begin, int64_t end, void* scratch) { kernels().l2norm_backward(p, dtype, begin, end, scratch); });
}

void topk_merge(const TopkParams& p) {
    over_rows(p.rows, p.cols, p.num_threads, 0, [&](int64_t begin, int64_t end, void*) {
        for (int64_t row = begin; row < end; ++row) p.is_double ? merge_row<double>(p, row) : merge_row<float>(p, row);
    });
}

void topk_finish(const TopkParams& p) {
    over_rows(p.rows, 16 * p.capacity, p.num_threads, 0, [&](int64_t begin, int64_t end, void*) {
        for (int64_t row = begin; row < end; ++row)
            p.is_double ? finish_row<double>(p, row) : finish_row<float>(p, row);
    });
}

void sampled_softmax_forward(const SampledParams& p, DType dtype) {
    const int64_t logits = p.samples + 1;
    over_rows(
        p.rows, 2 * logits * p.dim, p.num_threads, scratch_bytes(p.dim, logits),
        [&](int64_t begin, int64_t end, void* scratch) { kernels().sampled_forward(p, dtype, begin, end, scratch); });
}

void sampled_softmax_group(const SampledParams& p, int64_t* starts, int64_t* order) {
    const int64_t count = p.samples + 1;
    std::fill(starts, starts + p.items + 1, int64_t{0});
    const auto for_each_place = [&](const auto& body) {
        for (int64_t t = 0; t < p.rows; ++t)
            for (int64_t j = 0; j < count; ++j) body(p.item(t, j), t * count + j);
    };
    // Counts, then where every item begins; writing the places moves an item's entry to where the next one begins.
    for_each_place([&](int64_t item, int64_t) { ++starts[item]; });
    int64_t begin = 0;
    for (int64_t item = 0; item <= p.items; ++item) begin += std::exchange(starts[item], begin);
    for_each_place([&](int64_t item, int64_t place) { order[starts[item]++] = place; });
    std::memmove(starts + 1, starts, p.items * sizeof(int64_t));
    starts[0] = 0;
}

void sampled_softmax_backward_query(const SampledBackwardParams& p, DType dtype) {
    const int64_t logits = p.samples + 1;
    over_rows(p.rows, 2 * logits * p.dim, p.num_threads, scratch_bytes(p.dim, 0),
              [&](int64_t begin, int64_t end, void* scratch) {
                  kernels().sampled_backward_query(p, dtype, begin, end, scratch);
              });
}

void sampled_softmax_backward_table(const SampledBackwardParams& p, DType dtype) {
    const int64_t places = p.rows * (p.samples + 1), row_work = p.dim * (places / std::max<int64_t>(1, p.entries) + 1);
    over_rows(p.entries, row_work, p.num_threads, scratch_bytes(p.dim, 0),
              [&](int64_t begin, int64_t end, void* scratch) {
                  kernels().sampled_backward_table(p, dtype, begin, end, scratch);
              });
}

void in_batch_softmax_forward(const InBatchParams& p) {
    over_rows(p.rows, 8 * p.cols, p.num_threads, scratch_bytes(0, p.cols),
              [&](int64_t begin, int64_t end, void* scratch) {
                  for (int64_t row = begin; row < end; ++row) kernels().in_batch_forward(p, row, scratch);
              });
}

void in_batch_softmax_backward(const InBatchParams& p) {
    over_rows(p.rows, 8 * p.cols, p.num_threads, scratch_bytes(0, p.cols),
              [&](int64_t begin, int64_t end, void* scratch) {
                  for (int64_t row = begin; row < end; ++row) kernels().in_batch_backward(p, row, scratch);
              });
}

}  // namespace hstu::similarity::cpu
