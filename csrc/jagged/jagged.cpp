// Every check of the jagged ops, once, for all directions and devices; then the choice of the device.
#include "jagged/jagged.h"

#include "common/check.h"
#include "common/host_device.h"

#define CHECK(condition, ...) HSTU_CHECK(condition, "hstu_ext.", op, ": ", __VA_ARGS__)

namespace hstu::jagged {
namespace {

// An argument as the caller knows it: values, offsets[2].
struct Name {
    const char* text;
    int index = -1;  // -1: not an element of a list
};

void append(std::string& text, Name name) {
    text += name.text;
    if (name.index >= 0) text += '[' + std::to_string(name.index) + ']';
}

void check_given(const char* op, Name name, const Tensor& x) { CHECK(x, name, " must be a tensor, got None"); }

void check_like(const char* op, Name name, const Tensor& x, Name model_name, const Tensor& model) {
    CHECK(x.dtype == model.dtype, name, " must be ", model.dtype, " like ", model_name, ", got ", x.dtype);
    CHECK(x.device == model.device, name, " must be on ", Device{model.device}, " like ", model_name, ", got ",
          Device{x.device});
}

// Bytes of one row: of the dimensions from `first` on, which must be contiguous.
int64_t row_bytes(const char* op, Name name, const Tensor& x, int first) {
    int64_t elements = 1;
    for (int dim = x.rank - 1; dim >= first; --dim) {
        CHECK(x.shape[dim] <= 1 || elements == 0 || x.stride[dim] == elements, name,
              " must have contiguous rows, got a stride of ", x.stride[dim], " in dimension ", dim);
        elements *= x.shape[dim];
    }
    return elements * size_of(x.dtype);
}

// Strides of dimensions with one element are never used, and torch leaves anything in them.
int64_t stride_bytes(const Tensor& x, int dim, int64_t row) {
    return x.shape[dim] > 1 ? x.stride[dim] * size_of(x.dtype) : row;
}

Rows rows_of(const char* op, Name name, const Tensor& x) {
    check_given(op, name, x);
    CHECK(x.rank >= 1, name, " must be [rows, ...], got ", Shape{x});
    return {static_cast<char*>(x.data), x.shape[0], stride_bytes(x, 0, row_bytes(op, name, x, 1))};
}

// x [rows, ...] has the rows of model [rows, ...], or of [batch, rows, ...] with lead = 2.
void check_same_rows(const char* op, Name name, const Tensor& x, Name model_name, const Tensor& model, int lead) {
    check_like(op, name, x, model_name, model);
    bool same = x.rank - 1 == model.rank - lead;
    for (int dim = 1; same && dim < x.rank; ++dim) same = x.shape[dim] == model.shape[dim + lead - 1];
    CHECK(same, name, " must have rows like those of ", model_name, ", ", Shape{model}, ", got ", Shape{x});
}

IndexArray offsets_of(const char* op, Name name, const Tensor& x) {
    check_given(op, name, x);
    CHECK(x.dtype == DType::kInt32 || x.dtype == DType::kInt64, name, " must be torch.int32 or torch.int64, got ",
          x.dtype);
    CHECK(x.rank == 1 && x.shape[0] >= 1, name, " must be [batch + 1], got ", Shape{x});
    CHECK(x.shape[0] == 1 || x.stride[0] == 1, name, " must be contiguous, got a stride of ", x.stride[0]);
    return {x.data, x.dtype == DType::kInt64};
}

void check_offsets_device(const char* op, Name name, const Tensor& x, Name model_name, const Tensor& model) {
    CHECK(x.device == model.device, name, " must be on ", Device{model.device}, " like ", model_name, ", got ",
          Device{x.device});
}

Sizes check_offset_values(const char* op, Name name, const IndexArray& offsets, int64_t batch, int64_t rows) {
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t begin = offsets[b], end = offsets[b + 1];
        CHECK(begin >= 0 && begin <= end, name, " must start at 0 or more and never decrease, got ", begin, " and ",
              end, " for sequence ", b);
        longest = max_of(longest, end - begin);
    }
    const int64_t end = offsets[batch];
    CHECK(end >= 0 && end <= rows, name, " must be within the ", rows, " rows, got ", end, " at the end");
    return {end, longest};
}

#if !HSTU_EXT_CUDA
[[noreturn]] void fail_without_cuda(const char* op) {
    fail<MissingKernelError>(
        "hstu_ext.", op,
        ": the tensors are on a GPU and this build has CPU kernels only. Install with nvcc on the PATH and "
        "`pip install . -C cmake.define.HSTU_EXT_CUDA=on` (CMake: -DHSTU_EXT_CUDA=on)");
}
#endif

void check_joined_offsets(const JoinInputs& in) {
    const char* const op = in.op;
    const Tensor& model = in.offsets[0];
    const Name name{"joined offsets"};
    offsets_of(op, name, in.joined_offsets);
    check_like(op, name, in.joined_offsets, {"offsets", 0}, model);
    CHECK(in.joined_offsets.shape[0] == model.shape[0], name, " must be [", model.shape[0], "], got ",
          Shape{in.joined_offsets});
}

// The parts' rows that belong to a sequence must fit into the joined rows.
void check_join_values(const JoinInputs& in, const JoinParams& p) {
    const char* const op = in.op;
    int64_t left = p.joined.count;
    for (int i = 0; i < p.part_count; ++i) {
        const Part& part = p.parts[i];
        left -= check_offset_values(op, {"offsets", i}, part.offsets, p.batch, part.rows.count).end;
        CHECK(left >= 0, "offsets must add up to at most the ", p.joined.count, " rows of ",
              in.split ? "values" : "total", ", got ", p.joined.count - left, " in offsets[0] to offsets[", i, "]");
    }
}

}  // namespace

void check_part_count(const char* op, const char* name, int64_t count) {
    CHECK(count >= 1 && count <= kMaxParts, name, " must be a list of 1 to ", kMaxParts, " tensors, got ", count);
}

void check_offsets_count(const char* op, int64_t parts, int64_t count) {
    CHECK(count == parts, "offsets must be a list of ", parts, " like values, got ", count);
}

void join(const JoinInputs& in, Execution execution) {
    const char* const op = in.op;
    check_part_count(op, in.split ? "offsets" : "values", in.parts.size());
    check_offsets_count(op, in.parts.size(), in.offsets.size());
    JoinParams p;
    p.order = in.order;
    p.split = in.split;
    p.part_count = static_cast<int>(in.parts.size());
    p.num_threads = execution.num_threads;
    p.parts.resize(in.parts.size());

    // What the caller gave comes first: the parts to be joined, or the joined rows to be split.
    const Name joined_name{"values"}, parts_name{in.split ? "out" : "values"};
    const Name model_name{"values", in.split ? -1 : 0};
    const Tensor& model = in.split ? in.joined : in.parts[0];
    if (in.split) p.joined = rows_of(op, joined_name, in.joined);
    for (int i = 0; i < p.part_count; ++i) {
        const Name name{parts_name.text, i}, offsets_name{"offsets", i};
        p.parts[i] = {rows_of(op, name, in.parts[i]), offsets_of(op, offsets_name, in.offsets[i])};
        check_same_rows(op, name, in.parts[i], model_name, model, 1);
        check_offsets_device(op, offsets_name, in.offsets[i], model_name, model);
        CHECK(in.offsets[i].dtype == in.offsets[0].dtype, offsets_name, " must be ", in.offsets[0].dtype,
              " like offsets[0], got ", in.offsets[i].dtype);
        CHECK(in.offsets[i].shape[0] == in.offsets[0].shape[0], offsets_name, " must be [", in.offsets[0].shape[0],
              "] like offsets[0], got ", Shape{in.offsets[i]});
    }
    if (!in.split) {
        p.joined = rows_of(op, {"out"}, in.joined);
        check_same_rows(op, {"out"}, in.joined, model_name, model, 1);
    }
    if (!in.split) check_joined_offsets(in);
    p.offsets_are_int64 = in.offsets[0].dtype == DType::kInt64;
    CHECK(p.offsets_are_int64 || p.joined.count <= INT32_MAX, "offsets must be torch.int64 for ", p.joined.count,
          " rows, got torch.int32");
    p.row_bytes = row_bytes(op, model_name, model, 1);
    p.batch = in.offsets[0].shape[0] - 1;
    p.joined_offsets = in.joined_offsets.data;

    if (model.is_cuda()) {
#if HSTU_EXT_CUDA
        return cuda::join(p, model.device, execution.stream);
#else
        fail_without_cuda(op);
#endif
    }
    check_join_values(in, p);
    std::vector<int64_t> sums;
    if (in.split) {
        sums.resize(static_cast<size_t>(p.batch + 1));
        p.joined_offsets = sums.data();
    }
    cpu::join(p);
}

void dense(const DenseInputs& in, Execution execution) {
    const char* const op = in.op;
    const Name dense_name{in.to_jagged ? "dense" : "out"}, values_name{in.to_jagged ? "out" : "values"};
    DenseParams p;
    p.to_jagged = in.to_jagged;
    p.num_threads = execution.num_threads;
    if (!in.to_jagged) p.jagged = rows_of(op, values_name, in.values);
    p.offsets = offsets_of(op, {"offsets"}, in.offsets);
    p.batch = in.offsets.shape[0] - 1;
    check_given(op, dense_name, in.dense);
    CHECK(in.dense.rank >= 2 && in.dense.shape[0] == p.batch, dense_name, " must be [", p.batch,
          ", max_len, ...] for these offsets, got ", Shape{in.dense});
    p.row_bytes = row_bytes(op, dense_name, in.dense, 2);
    if (in.to_jagged) p.jagged = rows_of(op, values_name, in.values);
    check_same_rows(op, values_name, in.values, dense_name, in.dense, 2);
    check_offsets_device(op, {"offsets"}, in.offsets, in.to_jagged ? dense_name : values_name, in.dense);
    p.max_len = in.dense.shape[1];
    p.dense = static_cast<char*>(in.dense.data);
    p.dense_stride = stride_bytes(in.dense, 1, p.row_bytes);
    p.batch_stride = stride_bytes(in.dense, 0, p.max_len * p.row_bytes);
    const int bits = 8 * size_of(in.dense.dtype);
    p.padding = static_cast<uint64_t>(in.padding);
    if (bits < 64) p.padding &= (uint64_t{1} << bits) - 1;
    for (int width = bits; width < 64; width *= 2) p.padding |= p.padding << width;

    if (in.dense.is_cuda()) {
#if HSTU_EXT_CUDA
        return cuda::dense(p, in.dense.device, execution.stream);
#else
        fail_without_cuda(op);
#endif
    }
    check_offset_values(op, {"offsets"}, p.offsets, p.batch, p.jagged.count);
    cpu::dense(p);
}

Sizes sizes(const char* op, const char* name, int index, const Tensor& offsets, int64_t rows) {
    const IndexArray values = offsets_of(op, {name, index}, offsets);
    CHECK(!offsets.is_cuda(), Name({name, index}), " must be on cpu like offsets[0], got ", Device{offsets.device});
    return check_offset_values(op, {name, index}, values, offsets.shape[0] - 1, rows);
}

}  // namespace hstu::jagged
