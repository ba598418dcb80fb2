#include "attention/cpu/attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>

#include "attention/cpu/kernels.h"
#include "common/parallel.h"

namespace hstu::attention::cpu {
namespace {

struct Variant {
    const Kernels& kernels;
    bool supported;
};

// Best first.
std::vector<Variant> variants() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return {{avx512_kernels(), avx512}, {avx2_kernels(), avx2}, {baseline_kernels(), true}};
#else
    return {{baseline_kernels(), true}};
#endif
}

const Kernels& select_kernels() {
    const char* wanted = std::getenv("HSTU_EXT_CPU");
    std::string usable;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, variant.kernels.name) == 0)
            return variant.kernels;
        usable += (usable.empty() ? "" : ", ") + std::string(variant.kernels.name);
    }
    throw std::invalid_argument("hstu_ext.attention: HSTU_EXT_CPU must be one of " + usable + ", got " + wanted);
}

const Kernels& selected_kernels() {
    static const Kernels& kernels = select_kernels();
    return kernels;
}

// Memory that starts on a cache line and is not initialised.
class Buffer {
  public:
    explicit Buffer(size_t bytes) : data_(static_cast<char*>(::operator new(std::max<size_t>(bytes, 1), kAlignment))) {}
    char* at(size_t offset) const { return data_.get() + offset; }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(char* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<char, Free> data_;
};

int blocks_of(int rows, int block) { return (rows + block - 1) / block; }

// Rows [begin, end) of every head become 0.
void zero_rows(const Jagged& tensor, int64_t begin, int64_t end, int heads, int dim, DType dtype) {
    const int64_t size = size_of(dtype);
    for (int64_t row = begin; row < end; ++row)
        for (int head = 0; head < heads; ++head)
            std::memset(static_cast<char*>(tensor.data) + (row * tensor.row_stride + head * tensor.head_stride) * size,
                        0, static_cast<size_t>(dim * size));
}

// The rows of a packed tensor that no sequence uses become 0. range(b) gives the first row and the rows in use.
template <class Range>
void zero_unused(const Params& p, const Jagged& tensor, int64_t total, int dim, DType dtype, const Range& range) {
    int64_t covered = 0;
    for (int b = 0; b < p.batch; ++b) {
        const auto [begin, used] = range(Sequence(p, b));
        zero_rows(tensor, covered, begin, p.heads, dim, dtype);
        covered = std::max(covered, begin + used);
    }
    zero_rows(tensor, covered, total, p.heads, dim, dtype);
}

std::pair<int64_t, int> used_q(const Sequence& s) { return {s.q_begin, s.len_q}; }
std::pair<int64_t, int> used_k(const Sequence& s) { return {s.k_begin, s.len_k}; }

// Work of a sequence and head, in tile elements.
int64_t work_of(const Sequence& s) { return int64_t{s.len_q} * s.len_k + s.len_q + s.len_k; }

// The sequences, those with the most work first, so that the last items handed out are small.
std::vector<int> largest_first(const Params& p) {
    std::vector<int> order(p.batch);
    std::vector<int64_t> work(p.batch);
    std::iota(order.begin(), order.end(), 0);
    for (int b = 0; b < p.batch; ++b) work[b] = work_of(Sequence(p, b));
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return work[a] > work[b]; });
    return order;
}

int64_t total_work(const Params& p) {
    int64_t total = 0;
    for (int b = 0; b < p.batch; ++b) total += work_of(Sequence(p, b));
    return total * p.heads;
}

// All of the threads or one: an OpenMP team of another size than the last costs the threads of both.
int threads_for(const Params& p, int64_t work) {
    constexpr int64_t kWorthATeam = 1000000;  // multiply-adds that take one thread about as long as waking the others
    return work * (p.dim_qk + p.dim_v) < kWorthATeam ? 1 : std::max(1, p.num_threads);
}

struct BackwardItem {
    QueryBlocks blocks;
    char* partial;      // nullptr: the item has the whole sequence and head, and a partial of its worker's
    size_t tables = 0;  // offset of what it adds to the gradients of the tables
};

// A sequence and head whose query blocks are shared out to several items.
struct Split {
    int batch, head, count;
    size_t offset;  // of the first partial
};

struct BackwardPlan {
    std::vector<QueryBlocks> whole;
    std::vector<Split> splits;
    size_t split_bytes = 0;  // of all partials of splits
    size_t whole_bytes = 0;  // of the largest partial of a whole sequence
};

// Splits a sequence only where it holds a large part of all work, so that the sums that need memory stay few. The plan
// looks at the shapes alone, not at the threads: it decides the order of summation.
BackwardPlan plan_backward(const Params& p, DType dtype, const Kernels& kernels) {
    constexpr int kPieces = 16;
    BackwardPlan plan;
    const int64_t total = std::max<int64_t>(1, total_work(p));
    for (int b : largest_first(p)) {
        const Sequence s(p, b);
        const int64_t share = (work_of(s) * kPieces + total / 2) / total;
        const int pieces = static_cast<int>(std::min<int64_t>(share, blocks_of(s.len_q, 2 * kBlockQ)));
        const size_t bytes = kernels.partial_bytes(p, dtype, s.len_k);
        for (int h = 0; h < p.heads; ++h) {
            if (pieces > 1) {
                plan.splits.push_back({b, h, pieces, plan.split_bytes});
                plan.split_bytes += pieces * bytes;
            } else if (s.len_q > 0 || s.len_k > 0) {
                plan.whole.push_back({b, h, 0, 1});
                plan.whole_bytes = std::max(plan.whole_bytes, bytes);
            }
        }
    }
    return plan;
}

// Bytes of an item's share of the gradients of the tables, as relative.h lays it out.
size_t table_bytes(const BackwardParams& p, DType dtype, int batch) {
    const Sequence s(p, batch);
    const int64_t entries =
        (p.dposition ? int64_t{s.len_q} + s.len_k : 0) + (p.dtime ? int64_t{p.relative.num_buckets} + 1 : 0);
    return entries * (dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

// Sums the items' shares, in the order of the items, into the gradients of the tables.
template <class C>
void finish_tables(const BackwardParams& p, const std::vector<BackwardItem>& items, const char* shares) {
    const Relative& relative = p.relative;
    const auto sum = [&](void* gradient, int64_t head_stride, int64_t entries, const auto& add) {
        if (gradient == nullptr) return;
        for (int head = 0; head < (head_stride ? p.heads : 1); ++head) {
            std::vector<double> total(entries);
            for (const BackwardItem& item : items)
                if (head_stride == 0 || item.blocks.head == head)
                    add(Sequence(p, item.blocks.batch), reinterpret_cast<const C*>(shares + item.tables), total.data());
            for (int64_t i = 0; i < entries; ++i)
                static_cast<C*>(gradient)[head * head_stride + i] = static_cast<C>(total[i] * p.inv_scaling_fp64);
        }
    };
    sum(p.dposition, p.dposition_head_stride, 2 * int64_t{relative.reach} + 1,
        [&](const Sequence& s, const C* share, double* total) {
            for (int64_t i = 0, distance = 1 - int64_t{s.len_q}; i < int64_t{s.len_q} + s.len_k - 1; ++i, ++distance)
                total[clamp_to<int64_t>(distance, -relative.reach, relative.reach) + relative.reach] += share[i];
        });
    sum(p.dtime, p.dtime_head_stride, int64_t{relative.num_buckets} + 1,
        [&](const Sequence& s, const C* share, double* total) {
            if (p.dposition) share += int64_t{s.len_q} + s.len_k;
            for (int b = 0; b <= relative.num_buckets; ++b) total[b] += share[b];
        });
}

}  // namespace

void forward(const Params& p, DType dtype, MaskKind mask) {
    struct Item {
        int batch, head, block;
    };
    const Kernels& kernels = selected_kernels();
    zero_unused(p, p.out, p.total_q, p.dim_v, dtype, used_q);

    std::vector<Item> items;
    for (int b : largest_first(p))
        for (int block = blocks_of(Sequence(p, b).len_q, kBlockQ); block-- > 0;)
            for (int h = 0; h < p.heads; ++h) items.push_back({b, h, block});

    const int threads = threads_for(p, total_work(p));
    const size_t scratch_bytes = kernels.forward_scratch(p, dtype);
    const Buffer scratch(threads * scratch_bytes);
    parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t i, int worker) {
        const Item& item = items[i];
        kernels.forward(p, dtype, mask, item.batch, item.head, item.block, scratch.at(worker * scratch_bytes));
    });
}

void backward(const BackwardParams& p, DType dtype, MaskKind mask) {
    const Kernels& kernels = selected_kernels();
    zero_unused(p, p.dq, p.total_q, p.dim_qk, dtype, used_q);
    zero_unused(p, p.dk, p.total_k, p.dim_qk, dtype, used_k);
    zero_unused(p, p.dv, p.total_k, p.dim_v, dtype, used_k);

    const BackwardPlan plan = plan_backward(p, dtype, kernels);
    const Buffer partials(plan.split_bytes);
    std::vector<BackwardItem> items;
    for (const Split& split : plan.splits) {
        const size_t bytes = kernels.partial_bytes(p, dtype, Sequence(p, split.batch).len_k);
        for (int i = 0; i < split.count; ++i)
            items.push_back({{split.batch, split.head, i, split.count}, partials.at(split.offset + i * bytes)});
    }
    for (const QueryBlocks& blocks : plan.whole) items.push_back({blocks, nullptr});
    const bool tables_wanted = p.dposition || p.dtime;
    size_t shares_bytes = 0;
    if (tables_wanted)
        for (BackwardItem& item : items) {
            item.tables = shares_bytes;
            shares_bytes += table_bytes(p, dtype, item.blocks.batch);
        }
    const Buffer shares(shares_bytes);

    const int threads = threads_for(p, total_work(p));
    const size_t scratch_bytes = kernels.backward_scratch(p, dtype), worker_bytes = scratch_bytes + plan.whole_bytes;
    const Buffer scratch(threads * worker_bytes);
    parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t i, int worker) {
        const BackwardItem& item = items[i];
        char* memory = scratch.at(worker * worker_bytes);
        char* partial = item.partial != nullptr ? item.partial : memory + scratch_bytes;
        kernels.backward(p, dtype, mask, item.blocks, partial, tables_wanted ? shares.at(item.tables) : nullptr,
                         memory);
        if (item.partial == nullptr)
            kernels.finish(p, dtype, item.blocks.batch, item.blocks.head, partial, 1, 0,
                           Sequence(p, item.blocks.batch).len_k);
    });

    constexpr int kFinishRows = 256;
    struct FinishItem {
        const Split* split;
        int row0, rows;
    };
    std::vector<FinishItem> finishes;
    for (const Split& split : plan.splits) {
        const int len_k = Sequence(p, split.batch).len_k;
        for (int row = 0; row < len_k; row += kFinishRows)
            finishes.push_back({&split, row, std::min(kFinishRows, len_k - row)});
    }
    parallel_for(static_cast<int64_t>(finishes.size()), threads, [&](int64_t i, int) {
        const FinishItem& item = finishes[i];
        kernels.finish(p, dtype, item.split->batch, item.split->head, partials.at(item.split->offset),
                       item.split->count, item.row0, item.rows);
    });
    if (!tables_wanted) return;
    if (dtype == DType::kFloat64)
        finish_tables<double>(p, items, shares.at(0));
    else
        finish_tables<float>(p, items, shares.at(0));
}

std::vector<std::string> built_variants() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.emplace_back(variant.kernels.name);
    return names;
}

const char* selected_variant() { return selected_kernels().name; }

}  // namespace hstu::attention::cpu
