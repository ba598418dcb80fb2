// Every check of an attention call, once, for forward and backward, CPU and GPU; then the choice of the kernel.
#include "attention/api.h"

#include <algorithm>

#include "attention/cpu/attention.h"
#include "attention/mask.h"
#include "attention/params.h"
#include "common/check.h"

#if HSTU_EXT_CUDA
#include "attention/cell_table.h"
#include "attention/sm80/plan.h"
#include "attention/sm90/plan.h"
#include "common/cuda.h"
#endif

#define CHECK(condition, ...) HSTU_CHECK(condition, "hstu_ext.attention: ", __VA_ARGS__)

namespace hstu::attention {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 29;  // positions and window ends add up inside an int

void check_given(const char* name, const Tensor& x) { CHECK(x, name, " must be a tensor, got None"); }

void check_like_q(const char* name, const Tensor& x, const Tensor& q) {
    CHECK(x.dtype == q.dtype, name, " must be ", q.dtype, " like q, got ", x.dtype);
    CHECK(x.device == q.device, name, " must be on ", Device{q.device}, " like q, got ", Device{x.device});
}

// Strides of dimensions with one element are never used, and torch leaves anything in them.
int64_t stride_of(const Tensor& x, int dim) { return x.shape[dim] > 1 ? x.stride[dim] : 0; }

void check_packed(const char* name, const Tensor& x, const Tensor& q) {
    check_given(name, x);
    CHECK(x.rank == 3, name, " must be [total, heads, dim], got ", Shape{x});
    check_like_q(name, x, q);
    CHECK(x.shape[2] >= 8 && x.shape[2] <= 256 && x.shape[2] % 8 == 0, name,
          " must have a head dimension that is a multiple of 8 from 8 to 256, got ", Shape{x});
    CHECK(x.stride[2] == 1, name, " must be contiguous in its last dimension, got a stride of ", x.stride[2]);
}

void check_shape(const char* name, const Tensor& x, int64_t total, int64_t heads, int64_t dim) {
    CHECK(x.shape[0] == total && x.shape[1] == heads && x.shape[2] == dim, name, " must be [", total, ", ", heads, ", ",
          dim, "], got ", Shape{x});
}

// GPU kernels move 16 bytes at a time, and TMA knows no rows on top of each other.
Jagged packed(const char* name, const Tensor& x) {
    const Jagged view{x.data, stride_of(x, 0), stride_of(x, 1)};
    if (x.is_cuda()) {
        const int64_t unit = 16 / size_of(x.dtype);
        const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && view.row_stride % unit == 0 &&
                             view.head_stride % unit == 0 && (x.shape[0] <= 1 || view.row_stride != 0);
        if (!aligned) fail<MisalignedError>("hstu_ext.attention: ", name, " must have rows aligned to 16 bytes");
    }
    return view;
}

Jagged packed_like(const char* name, const Tensor& x, const Tensor& model, const Tensor& q) {
    check_packed(name, x, q);
    check_shape(name, x, model.shape[0], model.shape[1], model.shape[2]);
    return packed(name, x);
}

IndexArray index_array(const char* name, const Tensor& x, int64_t count, const Tensor& q) {
    if (!x) return {};
    CHECK(x.dtype == DType::kInt32 || x.dtype == DType::kInt64, name, " must be torch.int32 or torch.int64, got ",
          x.dtype);
    CHECK(x.rank == 1 && x.shape[0] == count, name, " must be [", count, "], got ", Shape{x});
    CHECK(stride_of(x, 0) <= 1, name, " must be contiguous, got a stride of ", x.stride[0]);
    CHECK(x.device == q.device, name, " must be on ", Device{q.device}, " like q, got ", Device{x.device});
    return {x.data, x.dtype == DType::kInt64};
}

Dense dense(const char* name, const Tensor& x, int64_t batch, int64_t heads, int64_t max_seqlen, const Tensor& q) {
    check_like_q(name, x, q);
    CHECK(x.rank == 4 && x.shape[0] == batch && (x.shape[1] == heads || x.shape[1] == 1) && x.shape[2] == x.shape[3] &&
              x.shape[2] >= max_seqlen,
          name, " must be [", batch, ", 1 or ", heads, ", M, M] with M >= ", max_seqlen, ", got ", Shape{x});
    CHECK(x.shape[3] <= 1 || x.stride[3] == 1, name, " must be contiguous in its last dimension, got a stride of ",
          x.stride[3]);
    return {x.data, stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), x.shape[2]};
}

void check_offsets(const char* name, const Tensor& x) {
    check_given(name, x);
    CHECK(x.rank == 1 && x.shape[0] >= 1, name, " must be [batch + 1], got ", Shape{x});
}

void check_length(const char* name, int64_t length) {
    CHECK(length >= 0 && length < kMaxLength, name, " must be 0 to ", kMaxLength - 1, ", got ", length);
}

void fill_tensors(const Inputs& in, Params& p) {
    const Tensor& q = in.q;
    check_packed("q", q, q);
    if (q.is_cuda())
        CHECK(q.dtype == DType::kFloat16 || q.dtype == DType::kBFloat16,
              "q must be torch.float16 or torch.bfloat16 on a GPU, got ", q.dtype);
    else
        CHECK(q.dtype == DType::kFloat32 || q.dtype == DType::kFloat64 || q.dtype == DType::kFloat16 ||
                  q.dtype == DType::kBFloat16,
              "q must be a floating point tensor, got ", q.dtype);
    check_packed("k", in.k, q);
    check_shape("k", in.k, in.k.shape[0], q.shape[1], q.shape[2]);
    check_packed("v", in.v, q);
    check_shape("v", in.v, in.k.shape[0], q.shape[1], in.v.shape[2]);
    check_offsets("cu_seqlens_q", in.cu_seqlens_q);
    check_offsets("cu_seqlens_k", in.cu_seqlens_k);
    const int64_t batch = in.cu_seqlens_q.shape[0] - 1;
    CHECK(batch <= INT32_MAX && q.shape[1] <= INT32_MAX, "q must have fewer than 2^31 sequences and heads, got ", batch,
          " and ", q.shape[1]);

    p.device = q.device;
    p.batch = static_cast<int>(batch);
    p.heads = static_cast<int>(q.shape[1]);
    p.dim_qk = static_cast<int>(q.shape[2]);
    p.dim_v = static_cast<int>(in.v.shape[2]);
    p.total_q = q.shape[0];
    p.total_k = in.k.shape[0];
    p.q = packed("q", q);
    p.k = packed("k", in.k);
    p.v = packed("v", in.v);
    p.cu_seqlens_q = index_array("cu_seqlens_q", in.cu_seqlens_q, batch + 1, q);
    p.cu_seqlens_k = index_array("cu_seqlens_k", in.cu_seqlens_k, batch + 1, q);
    p.seqused_q = index_array("seqused_q", in.seqused_q, batch, q);
    p.seqused_k = index_array("seqused_k", in.seqused_k, batch, q);
    if (in.rab) p.rab = dense("rab", in.rab, batch, p.heads, in.max_seqlen_k, q);
}

// A table [entries] or [heads, entries]; its head stride goes to `head_stride`.
const void* table(const char* name, const Tensor& x, const Tensor& q, int64_t& head_stride) {
    const DType wanted = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    CHECK(x.dtype == wanted, name, " must be ", wanted, " where q is ", q.dtype, ", got ", x.dtype);
    CHECK(x.device == q.device, name, " must be on ", Device{q.device}, " like q, got ", Device{x.device});
    const int last = x.rank - 1;
    CHECK((x.rank == 1 || (x.rank == 2 && x.shape[0] == q.shape[1])) && x.shape[last] >= 1 &&
              x.shape[last] < 2 * kMaxLength,
          name, " must be [entries] or [", q.shape[1], ", entries], got ", Shape{x});
    CHECK(stride_of(x, last) <= 1, name, " must be contiguous in its last dimension, got a stride of ", x.stride[last]);
    head_stride = x.rank == 2 ? stride_of(x, 0) : 0;
    return x.data;
}

const int64_t* times(const char* name, const Tensor& x, int64_t rows, const Tensor& q) {
    CHECK(x, name, " must be given with time_table, got None");
    CHECK(x.dtype == DType::kInt64, name, " must be torch.int64, got ", x.dtype);
    return static_cast<const int64_t*>(index_array(name, x, rows, q).data);
}

void fill_relative(const Inputs& in, Params& p) {
    Relative& relative = p.relative;
    CHECK(!in.rab || (!in.position_table && !in.time_table), "rab must be None where bias is given, got both");
    if (const Tensor& x = in.position_table) {
        relative.position = table("position_table", x, in.q, relative.position_head_stride);
        const int64_t entries = x.shape[x.rank - 1];
        CHECK(entries % 2 == 1, "position_table must have 2 * max_len - 1 entries, an odd number, got ", entries);
        relative.reach = static_cast<int>(entries / 2);
    }
    if (const Tensor& x = in.time_table) {
        relative.time = table("time_table", x, in.q, relative.time_head_stride);
        relative.num_buckets = static_cast<int>(x.shape[x.rank - 1]) - 1;
        relative.query_times = times("query_times", in.query_times, p.total_q, in.q);
        relative.key_times = times("key_times", in.key_times, p.total_k, in.q);
    }
}

void fill_scalars(const Inputs& in, Params& p) {
    check_length("max_seqlen_q", in.max_seqlen_q);
    check_length("max_seqlen_k", in.max_seqlen_k);
    CHECK(in.scaling_seqlen == -1 || in.scaling_seqlen > 0, "scaling_seqlen must be -1 or positive, got ",
          in.scaling_seqlen);
    const int64_t scaling = in.scaling_seqlen == -1 ? in.max_seqlen_q : in.scaling_seqlen;
    p.max_seqlen_q = static_cast<int>(in.max_seqlen_q);
    p.max_seqlen_k = static_cast<int>(in.max_seqlen_k);
    p.alpha_fp64 = in.alpha;
    p.inv_scaling_fp64 = scaling > 0 ? 1.0 / static_cast<double>(scaling) : 0.0;
    p.alpha = static_cast<float>(p.alpha_fp64);
    p.inv_scaling = static_cast<float>(p.inv_scaling_fp64);
}

MaskKind fill_mask(const Inputs& in, Params& p) {
    const int64_t left = in.window_left, right = in.window_right;
    CHECK(left >= -1 && left < kMaxLength && right >= -1 && right < kMaxLength,
          "window_size must be two lengths, or -1 for no limit, got (", left, ", ", right, ")");
    CHECK(in.target_group_size >= 1 && in.target_group_size < kMaxLength, "target_group_size must be 1 to ",
          kMaxLength - 1, ", got ", in.target_group_size);
    p.window_left = static_cast<int>(left);
    p.window_right = static_cast<int>(right);
    p.target_group_size = static_cast<int>(in.target_group_size);

    const bool has_targets = in.num_contexts || in.num_targets;
    if (in.func) {
        const Tensor& func = in.func;
        CHECK(!has_targets, "func must be None where num_contexts or num_targets is given, got both");
        CHECK(left == -1 && right == -1, "window_size must be (-1, -1) where func is given, got (", left, ", ", right,
              ")");
        CHECK(func.dtype == DType::kInt32, "func must be torch.int32, got ", func.dtype);
        CHECK(func.device == p.device, "func must be on ", Device{p.device}, " like q, got ", Device{func.device});
        CHECK(func.rank == 3 && (func.shape[0] == 1 || func.shape[0] == p.heads) && func.shape[1] % 2 == 1 &&
                  func.shape[1] <= INT32_MAX && func.shape[2] >= p.total_q,
              "func must be [1 or ", p.heads, ", an odd number, >= ", p.total_q, "], got ", Shape{func});
        CHECK(func.shape[2] <= 1 || func.stride[2] == 1,
              "func must be contiguous in its last dimension, got a stride of ", func.stride[2]);
        p.func = static_cast<const int32_t*>(func.data);
        p.func_count = static_cast<int>(func.shape[1]);
        p.func_head_stride = stride_of(func, 0);
        p.func_stride = stride_of(func, 1);
        return MaskKind::kInterval;
    }
    if (has_targets) {
        CHECK(left == -1 && right == 0, "window_size must be (-1, 0) where num_contexts or num_targets is given, got (",
              left, ", ", right, ")");
        p.num_contexts = index_array("num_contexts", in.num_contexts, p.batch, in.q);
        p.num_targets = index_array("num_targets", in.num_targets, p.batch, in.q);
        return MaskKind::kTarget;
    }
    return MaskKind::kWindow;
}

void check_offset_values(const char* name, const char* used_name, const char* max_name, const IndexArray& offsets,
                         const IndexArray& used, int batch, int64_t total, int64_t max_length) {
    for (int b = 0; b < batch; ++b) {
        const int64_t begin = offsets[b], end = offsets[b + 1];
        CHECK(begin >= 0 && begin <= end, name, " must start at 0 or more and never decrease, got ", begin, " and ",
              end, " for sequence ", b);
        CHECK(end <= total, name, " must end within the ", total, " rows, got ", end, " for sequence ", b);
        const int64_t length = end - begin;
        CHECK(length <= max_length, max_name, " must be at least every sequence's length, got ", max_length,
              " and a length of ", length, " for sequence ", b);
        if (used)
            CHECK(used[b] >= 0 && used[b] <= length, used_name, " must be 0 to the sequence's length, got ", used[b],
                  " and a length of ", length, " for sequence ", b);
    }
}

// What the index tensors hold can be read at no cost on the CPU only. GPU kernels clamp instead.
void check_index_values(const Params& p) {
    check_offset_values("cu_seqlens_q", "seqused_q", "max_seqlen_q", p.cu_seqlens_q, p.seqused_q, p.batch, p.total_q,
                        p.max_seqlen_q);
    check_offset_values("cu_seqlens_k", "seqused_k", "max_seqlen_k", p.cu_seqlens_k, p.seqused_k, p.batch, p.total_k,
                        p.max_seqlen_k);
    for (int b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        const int64_t contexts = p.num_contexts ? p.num_contexts[b] : 0;
        const int64_t targets = p.num_targets ? p.num_targets[b] : 0;
        CHECK(contexts >= 0 && targets >= 0 && contexts <= s.len_k && targets <= s.len_k - contexts,
              "num_contexts + num_targets must be within the sequence's ", s.len_k, " keys, got ", contexts, " + ",
              targets, " for sequence ", b);
        CHECK(!p.rab.data || s.len_q <= s.len_k, "rab must come with no more queries than keys, got ", s.len_q, " and ",
              s.len_k, " for sequence ", b);
    }
}

MaskKind fill(const Inputs& in, Params& p) {
    check_given("q", in.q);
    fill_tensors(in, p);
    fill_relative(in, p);
    fill_scalars(in, p);
    const MaskKind mask = fill_mask(in, p);
    if (!in.q.is_cuda()) check_index_values(p);
    return mask;
}

#if HSTU_EXT_CUDA
// No block would run.
bool is_empty(const Params& p) { return p.batch == 0 || p.heads == 0 || (p.total_q == 0 && p.total_k == 0); }

// Rows of half-precision elements whose heads lie side by side.
void zero(const Jagged& x, int64_t rows, int64_t row_elements, void* stream) {
    const size_t row_bytes = 2 * row_elements, pitch = rows > 1 ? 2 * x.row_stride : row_bytes;
    if (rows > 0 && row_bytes > 0)
        check_cuda(cudaMemset2DAsync(x.data, pitch, 0, row_bytes, rows, static_cast<cudaStream_t>(stream)),
                   "cudaMemset2DAsync");
}

int64_t scratch_of(Arch arch, int head_dim, const BackwardParams& p) {
    return arch == Arch::kSm90 ? sm90::dq_scratch_elements(p, head_dim) : sm80::dq_accum_elements(p, head_dim);
}

const Cell& cell_of(Direction direction, const Params& p, DType dtype, MaskKind mask, int capability) {
    const BiasKind bias = p.relative ? BiasKind::kRelative : p.rab.data ? BiasKind::kRab : BiasKind::kNone;
    return find_cell(direction, capability, dtype, max_of(p.dim_qk, p.dim_v), mask, bias);
}

// The sm90 family's backward knows no time table, and adds up the position table's gradient in no fixed order.
const Cell& backward_cell_of(const BackwardParams& p, DType dtype, MaskKind mask) {
    const int capability = compute_capability(p.device);
    const bool sm80_alone = p.relative && (p.relative.time != nullptr || p.deterministic);
    return cell_of(Direction::kBackward, p, dtype, mask, sm80_alone ? min_of(capability, 80) : capability);
}
#else
[[noreturn]] void fail_without_cuda() {
    fail<MissingKernelError>(
        "hstu_ext.attention: q is on a GPU and this build has CPU kernels only. Install with nvcc on the PATH and "
        "`pip install . -C cmake.define.HSTU_EXT_CUDA=on` (CMake: -DHSTU_EXT_CUDA=on)");
}
#endif

}  // namespace

// dposition or dtime: contiguous, of its table's shape.
static void* table_gradient(const char* name, const Tensor& x, const Tensor& table, const Tensor& q,
                            int64_t& head_stride) {
    if (!x) return nullptr;
    CHECK(table, name, " must be None where its table is, got ", Shape{x});
    CHECK(x.dtype == table.dtype && x.device == q.device, name, " must be ", table.dtype, " on ", Device{q.device},
          ", got ", x.dtype, " on ", Device{x.device});
    bool same = x.rank == table.rank;
    for (int i = 0; same && i < x.rank; ++i) same = x.shape[i] == table.shape[i];
    CHECK(same, name, " must be ", Shape{table}, ", got ", Shape{x});
    CHECK(stride_of(x, x.rank - 1) <= 1 && (x.rank == 1 || stride_of(x, 0) == x.shape[1] || x.shape[0] <= 1), name,
          " must be contiguous");
    head_stride = x.rank == 2 ? x.shape[1] : 0;
    return x.data;
}

void forward(const Inputs& inputs, const Tensor& out, Execution execution) {
    Params p;
    const MaskKind mask = fill(inputs, p);
    check_packed("out", out, inputs.q);
    check_shape("out", out, p.total_q, p.heads, p.dim_v);
    p.out = packed("out", out);

    if (p.device < 0) {
        p.num_threads = execution.num_threads;
        return cpu::forward(p, inputs.q.dtype, mask);
    }
#if HSTU_EXT_CUDA
    const Cell& cell = cell_of(Direction::kForward, p, inputs.q.dtype, mask, compute_capability(p.device));
    const DeviceGuard guard(p.device);
    if (is_empty(p)) return zero(p.out, p.total_q, p.heads * p.dim_v, execution.stream);
    cell.forward(p, execution.stream);
    check_cuda(cudaGetLastError(), cell.name);
#else
    fail_without_cuda();
#endif
}

void backward(const Inputs& inputs, const Gradients& gradients, bool deterministic, Execution execution) {
    const Tensor& q = inputs.q;
    BackwardParams p;
    const MaskKind mask = fill(inputs, p);
    check_packed("dout", gradients.dout, q);
    check_shape("dout", gradients.dout, p.total_q, p.heads, p.dim_v);
    p.dout = packed("dout", gradients.dout);
    p.dq = packed_like("dq", gradients.dq, q, q);
    p.dk = packed_like("dk", gradients.dk, inputs.k, q);
    p.dv = packed_like("dv", gradients.dv, inputs.v, q);
    if (gradients.drab) {
        CHECK(inputs.rab, "rab must be given where has_drab is set, got None");
        p.drab = dense("drab", gradients.drab, p.batch, p.heads, p.max_seqlen_k, q);
        CHECK(p.drab.size == p.rab.size && gradients.drab.shape[1] == p.heads, "drab must be [", p.batch, ", ", p.heads,
              ", ", p.rab.size, ", ", p.rab.size, "], got ", Shape{gradients.drab});
    }
    p.dposition = table_gradient("dposition", gradients.dposition, inputs.position_table, q, p.dposition_head_stride);
    p.dtime = table_gradient("dtime", gradients.dtime, inputs.time_table, q, p.dtime_head_stride);
    p.deterministic = deterministic;

    if (p.device < 0) {
        p.num_threads = execution.num_threads;
        return cpu::backward(p, q.dtype, mask);
    }
#if HSTU_EXT_CUDA
    const Cell& cell = backward_cell_of(p, q.dtype, mask);
    const DeviceGuard guard(p.device);
    if (is_empty(p)) {
        zero(p.dq, p.total_q, p.heads * p.dim_qk, execution.stream);
        zero(p.dk, p.total_k, p.heads * p.dim_qk, execution.stream);
        zero(p.dv, p.total_k, p.heads * p.dim_v, execution.stream);
        return;
    }
    if (const int64_t wanted = scratch_of(cell.arch, cell.head_dim, p); wanted > 0) {
        const Tensor& scratch = gradients.dq_accum;
        check_given("dq_accum", scratch);
        CHECK(scratch.dtype == DType::kFloat32 && scratch.device == p.device && scratch.rank == 1 &&
                  scratch.shape[0] >= wanted,
              "dq_accum must be torch.float32 [", wanted, "] on ", Device{p.device}, ", got ", scratch.dtype, " ",
              Shape{scratch}, " on ", Device{scratch.device});
        p.dq_accum = static_cast<float*>(scratch.data);
    }
    if (p.dposition || p.dtime) {
        const int64_t wanted = table_scratch(gradients.dposition, gradients.dtime);
        const Tensor& scratch = gradients.table_accum;
        CHECK(scratch && scratch.dtype == DType::kInt64 && scratch.device == p.device && scratch.rank == 1 &&
                  scratch.shape[0] >= wanted,
              "table_accum must be torch.int64 [", wanted, "] on ", Device{p.device});
        p.table_accum = static_cast<int64_t*>(scratch.data);
    }
    cell.backward(p, execution.stream);
    check_cuda(cudaGetLastError(), cell.name);
#else
    fail_without_cuda();
#endif
}

int64_t backward_scratch(const Tensor& q, const Tensor& v, const Tensor& cu_seqlens_q, int64_t max_seqlen_k,
                         bool deterministic) {
#if HSTU_EXT_CUDA
    check_packed("q", q, q);
    check_packed("v", v, q);
    check_offsets("cu_seqlens_q", cu_seqlens_q);
    check_length("max_seqlen_k", max_seqlen_k);
    if (!q.is_cuda()) return 0;
    BackwardParams p;
    p.batch = static_cast<int>(cu_seqlens_q.shape[0] - 1);
    p.heads = static_cast<int>(q.shape[1]);
    p.total_q = q.shape[0];
    p.total_k = v.shape[0];
    p.max_seqlen_k = static_cast<int>(max_seqlen_k);
    p.deterministic = deterministic;
    const int head_dim = head_dim_bucket(max_of(q.shape[2], v.shape[2]));
    // Which family serves the call is not known here, so there is enough for either.
    static const bool has_sm90 = std::any_of(
        cells().begin(), cells().end(), [](const Cell& cell) { return cell.arch == Arch::kSm90 && cell.backward; });
    const bool may_be_sm90 = has_sm90 && compute_capability(q.device) == 90;
    return max_of(may_be_sm90 ? scratch_of(Arch::kSm90, head_dim, p) : 0, scratch_of(Arch::kSm80, head_dim, p));
#else
    return 0;
#endif
}

int64_t table_scratch(const Tensor& dposition, const Tensor& dtime) {
    int64_t elements = 0;
    for (const Tensor* x : {&dposition, &dtime})
        if (*x) elements += x->rank == 2 ? x->shape[0] * x->shape[1] : x->shape[0];
    return elements * kExactWords;
}

}  // namespace hstu::attention
