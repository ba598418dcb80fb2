// Every check of the similarity ops, and the call of the kernel.
#include "similarity/api.h"

#include <cmath>

#include "common/check.h"
#include "common/execution.h"
#include "common/huge_pages.h"
#include "similarity/cpu/similarity.h"
#include "similarity/params.h"

#if HSTU_EXT_CUDA
#include "common/cuda.h"
#include "similarity/sm80/in_batch_fused.h"
#include "similarity/sm80/in_batch_records.h"
#include "similarity/sm80/in_batch_softmax.h"
#include "similarity/sm80/l2norm.h"
#include "similarity/sm80/sampled_softmax.h"
#include "similarity/sm80/topk.h"
#endif

#define CHECK(condition, ...) HSTU_CHECK(condition, "hstu_ext.", op, ": ", __VA_ARGS__)

namespace hstu::similarity {
namespace {

DType compute_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

bool is_floating(DType dtype) {
    return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
           dtype == DType::kBFloat16;
}

Matrix matrix(const Tensor& x) { return {x.data, x.rank == 2 && x.shape[0] > 1 ? x.stride[0] : 0}; }

// The checks of one op.
struct Checks {
    const char* op;

    // A floating point [rows, dim]; `form` is how the shape is written in the error.
    void rows(const char* name, const Tensor& x, const char* form) const {
        CHECK(x, name, " must be a tensor, got None");
        CHECK(x.rank == 2 && x.shape[1] >= 1, name, " must be ", form, ", got ", Shape{x});
        CHECK(is_floating(x.dtype), name, " must be a floating point tensor, got ", x.dtype);
        if (!x.is_cuda()) return;
#if HSTU_EXT_CUDA
        CHECK(x.dtype != DType::kFloat64, name,
              " must be torch.float32, torch.float16 or torch.bfloat16 on a GPU, got ", x.dtype);
#else
        fail<MissingKernelError>("hstu_ext.", op, ": ", name,
                                 " is on a GPU and this build has CPU kernels only. Install with nvcc on the PATH and "
                                 "`pip install . -C cmake.define.HSTU_EXT_CUDA=on` (CMake: -DHSTU_EXT_CUDA=on)");
#endif
    }

    void contiguous_rows(const char* name, const Tensor& x) const {
        CHECK(x.shape[0] == 0 || x.shape[1] <= 1 || x.stride[1] == 1, name,
              " must be contiguous in its last dimension, got a stride of ", x.stride[1]);
    }

    void like(const char* name, const Tensor& x, const char* model_name, const Tensor& model) const {
        CHECK(x.dtype == model.dtype, name, " must be ", model.dtype, " like ", model_name, ", got ", x.dtype);
        CHECK(x.device == model.device, name, " must be on ", Device{model.device}, " like ", model_name, ", got ",
              Device{x.device});
        CHECK(x.shape[1] == model.shape[1], name, " must have rows of ", model.shape[1], " like ", model_name, ", got ",
              Shape{x});
    }

    // [n] of the type, contiguous, on the device.
    void vector(const char* name, const Tensor& x, DType dtype, int64_t n, int device = -1) const {
        CHECK(x, name, " must be a tensor, got None");
        CHECK(x.dtype == dtype, name, " must be ", dtype, ", got ", x.dtype);
        CHECK(x.rank == 1 && x.shape[0] == n, name, " must be [", n, "], got ", Shape{x});
        CHECK(x.device == device, name, " must be on ", Device{device}, ", got ", Device{x.device});
        CHECK(n <= 1 || x.stride[0] == 1, name, " must be contiguous, got a stride of ", x.stride[0]);
    }

    // Contiguous int32 or int64 on the device; on the CPU every value is checked to be in [low, high).
    IndexArray indices(const char* name, const Tensor& x, int64_t low, int64_t high, int device = -1) const {
        CHECK(x.dtype == DType::kInt32 || x.dtype == DType::kInt64, name, " must be torch.int32 or torch.int64, got ",
              x.dtype);
        CHECK(x.device == device, name, " must be on ", Device{device}, ", got ", Device{x.device});
        int64_t count = 1, elements = 1;
        for (int i = 0; i < x.rank; ++i) elements *= x.shape[i];
        if (elements == 0) return {x.data, x.dtype == DType::kInt64};
        for (int i = x.rank - 1; i >= 0; --i) {
            CHECK(x.shape[i] == 1 || x.stride[i] == count, name, " must be contiguous, got a stride of ", x.stride[i]);
            count *= x.shape[i];
        }
        const IndexArray array{x.data, x.dtype == DType::kInt64};
        if (device >= 0) return array;
        for (int64_t i = 0; i < count; ++i)
            CHECK(array[i] >= low && array[i] < high, name, " must hold values from ", low, " to ", high - 1, ", got ",
                  array[i]);
        return array;
    }

    void positive(const char* name, double value) const {
        CHECK(value > 0 && std::isfinite(value), name, " must be positive, got ", value);
    }
};

}  // namespace

void advise_huge_pages(const Tensor& out) {
    if (out.is_cuda() || out.shape[0] == 0) return;
    const int64_t elements = (out.shape[0] - 1) * out.stride[0] + out.shape[1];
    hstu::advise_huge_pages(static_cast<char*>(out.data), elements * size_of(out.dtype));
}

void l2norm(const Tensor& x, const Tensor& out, double eps, Execution execution) {
    const Checks checks{"l2norm"};
    checks.rows("x", x, "[..., dim]");
    checks.contiguous_rows("x", x);
    checks.positive("eps", eps);
    const L2NormParams p{x.shape[0], x.shape[1], eps, matrix(x), {}, matrix(out), execution.num_threads};
    if (x.device < 0) {
        advise_huge_pages(out);
        return cpu::l2norm(p, x.dtype);
    }
#if HSTU_EXT_CUDA
    const DeviceGuard guard(x.device);
    sm80::l2norm(p, x.dtype, x.device, execution.stream);
#endif
}

void l2norm_backward(const Tensor& dout, const Tensor& x, const Tensor& dx, double eps, Execution execution) {
    const Checks checks{"l2norm"};
    checks.rows("dout", dout, "[..., dim]");
    checks.contiguous_rows("dout", dout);
    const bool is_wide = dout.is_cuda() && dout.dtype == DType::kFloat32;
    Tensor model = x;
    if (is_wide) model.dtype = dout.dtype;
    checks.like("dout", dout, "x", model);
    const L2NormParams p{x.shape[0], x.shape[1], eps, matrix(x), matrix(dout), matrix(dx), execution.num_threads};
    if (x.device < 0) {
        advise_huge_pages(dx);
        return cpu::l2norm_backward(p, x.dtype);
    }
#if HSTU_EXT_CUDA
    const DeviceGuard guard(x.device);
    sm80::l2norm_backward(p, x.dtype, dout.dtype, x.device, execution.stream);
#endif
}

void check_l2norm_dot(const Tensor& q, const Tensor& items, double eps) {
    const Checks checks{"l2norm_dot"};
    checks.rows("q", q, "[M, D]");
    checks.rows("items", items, "[N, D]");
    checks.like("items", items, "q", q);
    checks.positive("eps", eps);
}

void check_topk_dot(const TopkInputs& in) {
    const Checks checks{"topk_dot"};
    const char* const op = checks.op;
    checks.rows("query", in.query, "[B, D]");
    checks.rows("items", in.items, "[N, D]");
    checks.like("items", in.items, "query", in.query);
    const int64_t batch = in.query.shape[0], count = in.items.shape[0];
    CHECK(in.k >= 1 && in.k <= count, "k must be 1 to the ", count, " items, got ", in.k);
    const int device = in.query.device;
    CHECK(device < 0 || count <= UINT32_MAX, "items must be fewer than 2^32 rows on a GPU, got ", count);
    if (in.valid) checks.vector("valid", in.valid, DType::kBool, count, device);
    if (!in.exclude) return;
    CHECK(in.exclude.device == device, "exclude must be on ", Device{device}, " like query, got ",
          Device{in.exclude.device});
    CHECK(in.exclude.dtype == DType::kInt64, "exclude must be torch.int64, got ", in.exclude.dtype);
    if (!in.exclude_offsets) {
        CHECK(in.exclude.rank == 2 && in.exclude.shape[0] == batch, "exclude must be [", batch,
              ", E], or [total] with offsets, got ", Shape{in.exclude});
    } else {
        CHECK(in.exclude.rank == 1, "exclude must be [total] where offsets are given, got ", Shape{in.exclude});
        checks.vector("exclude's offsets", in.exclude_offsets, DType::kInt64, batch + 1, device);
        if (device >= 0) return;  // the kernels clamp what they read
        const int64_t* const offsets = static_cast<const int64_t*>(in.exclude_offsets.data);
        CHECK(offsets[0] == 0 && offsets[batch] == in.exclude.shape[0], "exclude's offsets must go from 0 to ",
              in.exclude.shape[0], ", got ", offsets[0], " to ", offsets[batch]);
        for (int64_t b = 0; b < batch; ++b)
            CHECK(offsets[b] <= offsets[b + 1], "exclude's offsets must never decrease, got ", offsets[b], " and ",
                  offsets[b + 1], " for row ", b);
    }
    checks.indices("exclude", in.exclude, -1, count, device);
}

#if HSTU_EXT_CUDA
namespace {

sm80::TopkScan topk_params(const TopkInputs& in, const TopkState& state) {
    sm80::TopkScan p{};
    p.rows = in.query.shape[0];
    p.items = in.items.shape[0];
    p.dim = in.query.shape[1];
    p.k = static_cast<int>(in.k);
    p.capacity = sm80::topk_capacity(in.k);
    p.query = matrix(in.query);
    p.catalogue = matrix(in.items);
    p.thresholds = static_cast<uint64_t*>(state.scratch.data);
    p.counts = reinterpret_cast<int*>(p.thresholds + p.rows);
    p.kept = p.counts + p.rows;
    p.keys = p.thresholds + 2 * p.rows;
    p.excluded = static_cast<const int64_t*>(in.exclude.data);
    p.excluded_offsets = static_cast<const int64_t*>(in.exclude_offsets.data);
    p.excluded_count = in.exclude ? in.exclude.shape[0] : 0;
    p.valid = static_cast<const bool*>(in.valid.data);
    p.values = static_cast<float*>(state.values.data);
    p.indices = static_cast<int64_t*>(state.indices.data);
    p.device = in.query.device;
    return p;
}

bool has_contiguous_rows(const Tensor& x) { return x.shape[1] == 1 || x.stride[1] == 1; }

}  // namespace

int64_t topk_capacity(int64_t k) { return k <= sm80::kTopkMaxK ? sm80::topk_capacity(k) : 0; }

bool topk_scan(const TopkInputs& in, const TopkState& state, Execution execution) {
    const bool is_half = in.query.dtype == DType::kFloat16 || in.query.dtype == DType::kBFloat16;
    if (!is_half || !has_contiguous_rows(in.query) || !has_contiguous_rows(in.items)) return false;
    const sm80::TopkScan p = topk_params(in, state);
    if (sm80::topk_scan_rows(p) == 0) return false;
    const DeviceGuard guard(p.device);
    sm80::topk_scan(p, in.query.dtype, execution.stream);
    return true;
}

void topk_merge_scores(const TopkInputs& in, const Tensor& scores, int64_t col0, bool last, const TopkState& state,
                       Execution execution) {
    const DeviceGuard guard(in.query.device);
    sm80::topk_merge(topk_params(in, state), {matrix(scores), col0, scores.shape[1]}, last, execution.stream);
}
#else
int64_t topk_capacity(int64_t) { return 0; }
bool topk_scan(const TopkInputs&, const TopkState&, Execution) { return false; }
void topk_merge_scores(const TopkInputs&, const Tensor&, int64_t, bool, const TopkState&, Execution) {}
#endif

void topk_merge(const TopkTile& tile, int num_threads) {
    TopkParams p{};
    p.rows = tile.scores.shape[0];
    p.cols = tile.scores.shape[1];
    p.k = tile.k;
    p.col0 = tile.col0;
    p.capacity = tile.kept.shape[1] * static_cast<int64_t>(sizeof(int64_t)) / cpu::kCandidateBytes;
    p.is_double = tile.scores.dtype == DType::kFloat64;
    p.scores = matrix(tile.scores);
    p.kept = tile.kept.data;
    p.counts = static_cast<int64_t*>(tile.counts.data);
    p.thresholds = tile.thresholds.data;
    p.excluded = static_cast<const int64_t*>(tile.excluded.data);
    p.excluded_offsets = static_cast<const int64_t*>(tile.excluded_offsets.data);
    p.valid = static_cast<const bool*>(tile.valid.data);
    p.num_threads = num_threads;
    cpu::topk_merge(p);
}

void topk_finish(const Tensor& kept, const Tensor& counts, const Tensor& values, const Tensor& indices,
                 int num_threads) {
    TopkParams p{};
    p.rows = values.shape[0];
    p.k = values.shape[1];
    p.capacity = kept.shape[1] * static_cast<int64_t>(sizeof(int64_t)) / cpu::kCandidateBytes;
    p.is_double = values.dtype == DType::kFloat64;
    p.kept = kept.data;
    p.counts = static_cast<int64_t*>(counts.data);
    p.values = matrix(values);
    p.indices = static_cast<int64_t*>(indices.data);
    p.num_threads = num_threads;
    cpu::topk_finish(p);
}

namespace {

SampledParams sampled_params(const SampledInputs& in, int num_threads) {
    SampledParams p{};
    p.rows = in.query.shape[0];
    p.dim = in.query.shape[1];
    p.items = in.table.shape[0];
    p.samples = in.neg_ids.shape[1];
    p.inv_temperature = 1 / in.temperature;
    p.eps = in.eps;
    p.query = matrix(in.query);
    p.table = matrix(in.table);
    p.positive = {in.pos_ids.data, in.pos_ids.dtype == DType::kInt64};
    p.negative = {in.neg_ids.data, in.neg_ids.dtype == DType::kInt64};
    p.log_q = in.log_q.data;
    p.num_threads = num_threads;
    return p;
}

SampledBackwardParams sampled_backward_params(const SampledInputs& in, const SampledGradients& gradients,
                                              int num_threads) {
    SampledBackwardParams p{};
    static_cast<SampledParams&>(p) = sampled_params(in, num_threads);
    p.dloss = gradients.dloss.data;
    p.lse = gradients.lse.data;
    p.similarity = gradients.similarity.data;
    p.weight = gradients.weight.data;
    p.unit_query = gradients.unit_query.data;
    p.dquery = matrix(gradients.dquery);
    return p;
}

}  // namespace

void sampled_softmax_forward(const SampledInputs& in, const Tensor& loss, const Tensor& of_rows, const Tensor& of_pairs,
                             Execution execution) {
    const Checks checks{"sampled_softmax_loss"};
    const char* const op = checks.op;
    checks.rows("query", in.query, "[T, D]");
    checks.contiguous_rows("query", in.query);
    checks.rows("table", in.table, "[V, D]");
    checks.contiguous_rows("table", in.table);
    checks.like("table", in.table, "query", in.query);
    const int64_t rows = in.query.shape[0], items = in.table.shape[0];
    const int device = in.query.device;
    CHECK(in.pos_ids && in.pos_ids.rank == 1 && in.pos_ids.shape[0] == rows, "pos_ids must be [", rows, "], got ",
          Shape{in.pos_ids});
    CHECK(in.neg_ids && in.neg_ids.rank == 2 && in.neg_ids.shape[0] == rows, "neg_ids must be [", rows, ", K], got ",
          Shape{in.neg_ids});
    checks.indices("pos_ids", in.pos_ids, 0, items, device);
    checks.indices("neg_ids", in.neg_ids, 0, items, device);
    checks.positive("temperature", in.temperature);
    checks.positive("eps", in.eps);
    if (in.log_q) checks.vector("log_q", in.log_q, compute_type(in.query.dtype), items, device);

    SampledParams p = sampled_params(in, execution.num_threads);
    p.loss = loss.data;
    if (!in.query.is_cuda()) {
        p.lse = of_rows.data;
        p.similarity = of_pairs.data;
        return cpu::sampled_softmax_forward(p, in.query.dtype);
    }
#if HSTU_EXT_CUDA
    CHECK(items <= INT32_MAX && (items > 0 || rows == 0), "table must have 1 to 2^31 - 1 rows on a GPU, got ", items);
    const SampledForwardParams gpu{p, static_cast<float*>(of_rows.data), static_cast<float*>(of_pairs.data)};
    const DeviceGuard guard(device);
    sm80::sampled_softmax_forward(gpu, in.query.dtype, device, execution.stream);
#endif
}

int64_t sampled_softmax_sort_bytes(int64_t pairs, int64_t items) {
#if HSTU_EXT_CUDA
    return static_cast<int64_t>(sm80::sampled_softmax_sort_bytes(pairs, items));
#else
    return pairs * items * 0;
#endif
}

int sampled_softmax_sort(const SampledInputs& in, const SampledPairs& pairs, Execution execution) {
    Checks{"sampled_softmax_loss"}.rows("query", in.query, "[T, D]");
#if HSTU_EXT_CUDA
    sm80::SampledSort sort{};
    for (int half = 0; half < 2; ++half) {
        sort.items[half] = static_cast<uint32_t*>(pairs.items[half].data);
        sort.order[half] = static_cast<uint32_t*>(pairs.order[half].data);
    }
    sort.scratch = pairs.scratch.data;
    sort.scratch_bytes = static_cast<size_t>(pairs.scratch.shape[0]) * sizeof(int64_t);
    const DeviceGuard guard(in.query.device);
    return sm80::sampled_softmax_sort(sampled_params(in, 1), sort, in.query.device, execution.stream);
#else
    return 0;
#endif
}

void sampled_softmax_table(const SampledInputs& in, const SampledTableGradient& gradient, Execution execution) {
    Checks{"sampled_softmax_loss"}.rows("query", in.query, "[T, D]");
#if HSTU_EXT_CUDA
    SampledTableParams p{};
    static_cast<SampledParams&>(p) = sampled_params(in, 1);
    p.dloss = static_cast<const float*>(gradient.dloss.data);
    p.dsimilarity = static_cast<const float*>(gradient.dsimilarity.data);
    p.pairs = gradient.pair_items.shape[0];
    p.pair_items = static_cast<const int32_t*>(gradient.pair_items.data);
    p.order = static_cast<const uint32_t*>(gradient.order.data);
    p.pair_rows = static_cast<const int64_t*>(gradient.pair_rows.data);
    p.row_items = static_cast<const int64_t*>(gradient.row_items.data);
    p.chunk = gradient.chunk;
    p.partial = static_cast<float*>(gradient.partial.data);
    p.sums = static_cast<float*>(gradient.sums.data);
    p.dtable = matrix(gradient.dtable);
    p.table_rows = gradient.dtable.shape[0];
    const DeviceGuard guard(in.query.device);
    sm80::sampled_softmax_table(p, in.query.dtype, in.query.device, execution.stream);
#endif
}

void sampled_softmax_group(const SampledInputs& in, const Tensor& starts, const Tensor& order) {
    cpu::sampled_softmax_group(sampled_params(in, 1), static_cast<int64_t*>(starts.data),
                               static_cast<int64_t*>(order.data));
}

void sampled_softmax_backward_query(const SampledInputs& in, const SampledGradients& gradients, int num_threads) {
    cpu::sampled_softmax_backward_query(sampled_backward_params(in, gradients, num_threads), in.query.dtype);
}

void sampled_softmax_backward_table(const SampledInputs& in, const SampledGradients& gradients, const Tensor& starts,
                                    const Tensor& order, const Tensor& ids, const Tensor& dtable, int num_threads) {
    SampledBackwardParams p = sampled_backward_params(in, gradients, num_threads);
    p.starts = static_cast<const int64_t*>(starts.data);
    p.order = static_cast<const int64_t*>(order.data);
    p.ids = static_cast<const int64_t*>(ids.data);
    p.entries = dtable.shape[0];
    p.dtable = matrix(dtable);
    cpu::sampled_softmax_backward_table(p, in.query.dtype);
}

void check_in_batch_softmax(const InBatchInputs& in, double eps) {
    const Checks checks{"in_batch_softmax_loss"};
    const char* const op = checks.op;
    checks.rows("query", in.query, "[T, D]");
    checks.rows("items", in.items, "[X, D]");
    checks.like("items", in.items, "query", in.query);
    const int64_t rows = in.query.shape[0], count = in.items.shape[0];
    const int device = in.query.device;
    checks.vector("item_ids", in.item_ids, DType::kInt64, count, device);
    checks.vector("positives", in.positives, DType::kInt64, rows, device);
    if (in.query.is_cuda())
        CHECK((count > 0 || rows == 0) && rows + 2 * count <= INT64_C(1) << 29,
              "items must have 1 to 2^28 rows on a GPU, less half of the ", rows, " queries, got ", count);
    checks.indices("positives", in.positives, 0, count, device);
    if (in.sequence_ids) {
        checks.vector("sequence_ids", in.sequence_ids, DType::kInt64, rows, device);
        checks.vector("item_sequence_ids", in.item_sequence_ids, DType::kInt64, count, device);
    }
    if (in.log_q) checks.vector("log_q", in.log_q, compute_type(in.query.dtype), count, device);
    checks.positive("temperature", in.temperature);
    checks.positive("eps", eps);
}

namespace {

InBatchParams in_batch_params(const InBatchInputs& in, const InBatchTile& tile, int num_threads) {
    InBatchParams p{};
    p.rows = tile.similarity.shape[0];
    p.cols = tile.similarity.shape[1];
    p.row0 = tile.row0;
    p.col0 = tile.col0;
    p.items = in.items.shape[0];
    p.is_double = tile.similarity.dtype == DType::kFloat64;
    p.inv_temperature = 1 / in.temperature;
    p.threshold = tile.threshold;
    p.similarity = matrix(tile.similarity);
    p.duplicate = matrix(tile.duplicate);
    p.positives = static_cast<const int64_t*>(in.positives.data);
    p.item_ids = static_cast<const int64_t*>(in.item_ids.data);
    p.query_sequences = static_cast<const int64_t*>(in.sequence_ids.data);
    p.item_sequences = static_cast<const int64_t*>(in.item_sequence_ids.data);
    p.log_q = in.log_q.data;
    p.query_records = in.query_records.data;
    p.item_records = in.item_records.data;
    p.num_threads = num_threads;
    return p;
}

}  // namespace

void in_batch_softmax_forward(const InBatchInputs& in, const InBatchTile& tile, const Tensor& maximum,
                              const Tensor& sum, const Tensor& positive_logit, Execution execution) {
    InBatchParams p = in_batch_params(in, tile, execution.num_threads);
    p.maximum = maximum.data;
    p.sum = sum.data;
    p.positive_logit = positive_logit.data;
    const int device = in.query.device;
    if (device < 0) return cpu::in_batch_softmax_forward(p);
#if HSTU_EXT_CUDA
    const DeviceGuard guard(device);
    sm80::in_batch_softmax_forward(p, device, execution.stream);
#endif
}

void in_batch_softmax_backward(const InBatchInputs& in, const InBatchTile& tile, const Tensor& dloss, const Tensor& lse,
                               Execution execution) {
    InBatchParams p = in_batch_params(in, tile, execution.num_threads);
    p.dloss = dloss.data;
    p.lse = lse.data;
    const int device = in.query.device;
    if (device < 0) return cpu::in_batch_softmax_backward(p);
#if HSTU_EXT_CUDA
    const DeviceGuard guard(device);
    sm80::in_batch_softmax_backward(p, in.query.dtype, device, execution.stream);
#endif
}

#if HSTU_EXT_CUDA
void in_batch_softmax_records(const InBatchInputs& in, double eps, const Tensor& slots, Execution execution) {
    sm80::InBatchRecords p{};
    p.queries = in.query.shape[0];
    p.items = in.items.shape[0];
    p.dim = in.query.shape[1];
    p.inverse_temperature = static_cast<float>(1 / in.temperature);
    p.inverse_eps = static_cast<float>(1 / eps);
    p.query = matrix(in.query);
    p.item = matrix(in.items);
    p.positives = static_cast<const int64_t*>(in.positives.data);
    p.item_ids = static_cast<const int64_t*>(in.item_ids.data);
    p.query_sequences = static_cast<const int64_t*>(in.sequence_ids.data);
    p.item_sequences = static_cast<const int64_t*>(in.item_sequence_ids.data);
    p.log_q = static_cast<const float*>(in.log_q.data);
    p.slots = static_cast<unsigned long long*>(slots.data);
    p.slot_count = static_cast<uint32_t>(slots.shape[0]);
    p.query_records = static_cast<sm80::QueryRecord*>(in.query_records.data);
    p.item_records = static_cast<sm80::ItemRecord*>(in.item_records.data);
    const DeviceGuard guard(in.query.device);
    sm80::in_batch_records(p, in.query.dtype, in.query.device, execution.stream);
}

namespace {

sm80::InBatchFused fused_params(const InBatchInputs& in) {
    sm80::InBatchFused p{};
    p.queries = in.query.shape[0];
    p.items = in.items.shape[0];
    p.dim = in.query.shape[1];
    p.query = matrix(in.query);
    p.item = matrix(in.items);
    p.query_records = static_cast<const sm80::QueryRecord*>(in.query_records.data);
    p.item_records = static_cast<const sm80::ItemRecord*>(in.item_records.data);
    p.inv_temperature = static_cast<float>(1 / in.temperature);
    p.device = in.query.device;
    return p;
}

}  // namespace

int64_t in_batch_fused_splits(const Tensor& rows, const Tensor& others) {
    const auto serves = [](const Tensor& x) {
        const bool is_half = x.dtype == DType::kFloat16 || x.dtype == DType::kBFloat16;
        return is_half && has_contiguous_rows(x) && matrix(x).stride % 8 == 0 && x.shape[0] <= INT32_MAX &&
               reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    };
    if (!serves(rows) || !serves(others)) return 0;
    return sm80::in_batch_splits(rows.shape[0], others.shape[0], rows.shape[1], rows.device);
}

void in_batch_fused_forward(const InBatchInputs& in, const InBatchShares& shares, Execution execution) {
    sm80::InBatchFused p = fused_params(in);
    p.splits = static_cast<int>(shares.maximum.shape[0]);
    p.maximum = static_cast<float*>(shares.maximum.data);
    p.sum = static_cast<float*>(shares.sum.data);
    p.positive_logit = static_cast<float*>(shares.positive_logit.data);
    p.loss = static_cast<float*>(shares.loss.data);
    p.lse = static_cast<float*>(shares.lse.data);
    const DeviceGuard guard(p.device);
    sm80::in_batch_fused_forward(p, in.query.dtype, execution.stream);
}

void in_batch_fused_backward(const InBatchInputs& in, const Tensor& dloss, const Tensor& lse, const Tensor& gradient,
                             bool of_items, int64_t splits, Execution execution) {
    sm80::InBatchFused p = fused_params(in);
    p.splits = static_cast<int>(splits);
    p.dloss = static_cast<const float*>(dloss.data);
    p.lse = static_cast<float*>(lse.data);
    p.gradient = static_cast<float*>(gradient.data);
    const DeviceGuard guard(p.device);
    sm80::in_batch_fused_backward(p, in.query.dtype, of_items, execution.stream);
}
#else
void in_batch_softmax_records(const InBatchInputs&, double, const Tensor&, Execution) {}
int64_t in_batch_fused_splits(const Tensor&, const Tensor&) { return 0; }
void in_batch_fused_forward(const InBatchInputs&, const InBatchShares&, Execution) {}
void in_batch_fused_backward(const InBatchInputs&, const Tensor&, const Tensor&, const Tensor&, bool, int64_t,
                             Execution) {}
#endif

}  // namespace hstu::similarity
