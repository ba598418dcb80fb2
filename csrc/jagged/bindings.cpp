// hstu_ext._C.jagged_*. Arguments are positional; python/hstu_ext/_C.pyi gives their names and types.
#include "jagged/bindings.h"

#include <algorithm>
#include <initializer_list>

#include "common/arguments.h"
#include "common/check.h"
#include "jagged/jagged.h"

namespace py = pybind11;

namespace hstu::jagged {
namespace {

const char* op_of(bool split, bool interleave) {
    if (split) return interleave ? "jagged_deinterleave" : "jagged_split";
    return interleave ? "jagged_interleave" : "jagged_concat";
}

void jagged_join(bool split, bool interleave, py::args values) {
    JoinInputs inputs;
    inputs.op = op_of(split, interleave);
    Arguments args(inputs.op, std::move(values));
    inputs.order = interleave ? Order::kInterleave : Order::kConcat;
    inputs.split = split;
    inputs.joined = args.tensor("values");
    inputs.joined_offsets = args.tensor("offsets");
    inputs.parts = args.tensors("values");
    inputs.offsets = args.tensors("offsets");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    join(inputs, execution);
}

void jagged_dense(bool to_jagged, py::args values) {
    DenseInputs inputs;
    inputs.op = to_jagged ? "dense_to_jagged" : "jagged_to_dense";
    Arguments args(inputs.op, std::move(values));
    inputs.to_jagged = to_jagged;
    inputs.dense = args.tensor("dense");
    inputs.values = args.tensor("values");
    inputs.offsets = args.tensor("offsets");
    inputs.padding = args.integer("padding_value");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    dense(inputs, execution);
}

// [(end, longest)] of every offsets tensor.
py::list jagged_sizes(const char* op, int64_t rows, bool is_list, py::args values) {
    const int count = static_cast<int>(values.size());
    Arguments args(op, std::move(values));
    py::list result;
    for (int i = 0; i < count; ++i) {
        const Sizes found = sizes(op, "offsets", is_list ? i : -1, args.tensor("offsets"), rows);
        result.append(py::make_tuple(found.end, found.longest));
    }
    return result;
}

// Plans: (the shapes of what a call allocates, whether an input requires a gradient), or None where the type of a tensor
// is not in the set `plain`. In Python, each look at a tensor takes as long as all of a plan.

bool is_plain(py::handle plain, py::handle tensor) {
    return PySet_Contains(plain.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))) == 1;
}

bool are_plain(py::handle plain, const List& tensors) {
    for (Py_ssize_t i = 0; i < tensors.size(); ++i)
        if (!is_plain(plain, tensors[i])) return false;
    return true;
}

bool requires_gradient(py::handle tensor) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    return tensor.attr(name).ptr() == Py_True;
}

// The sizes, then the dimensions of x from `first` on.
py::tuple shape_of(std::initializer_list<int64_t> sizes, const Tensor& x, int first) {
    py::tuple shape(sizes.size() + static_cast<size_t>(std::max(x.rank - first, 0)));
    size_t i = 0;
    for (const int64_t size : sizes) shape[i++] = size;
    for (int dim = first; dim < x.rank; ++dim) shape[i++] = x.shape[dim];
    return shape;
}

py::object jagged_join_plan(bool interleave, py::handle plain, py::handle values, py::handle offsets,
                            py::handle total) {
    const char* const op = op_of(false, interleave);
    const List parts(op, "values", "a list of tensors", values);
    const List own_offsets(op, "offsets", "a list of tensors", offsets);
    check_part_count(op, "values", parts.size());
    check_offsets_count(op, parts.size(), own_offsets.size());
    if (!are_plain(plain, parts) || !are_plain(plain, own_offsets)) return py::none();
    const Tensor first = read_tensor(op, "values", parts[0]);
    py::tuple rows(parts.size());
    int64_t sum = 0;
    bool is_recorded = false;
    for (Py_ssize_t i = 0; i < parts.size(); ++i) {
        const Tensor x = read_tensor(op, "values", parts[i]);
        rows[i] = x.shape[0];
        sum += x.shape[0];
        is_recorded |= requires_gradient(parts[i]);
    }
    if (!total.is_none()) sum = read_size(op, "total", total);
    return py::make_tuple(shape_of({sum}, first, 1), rows, is_recorded);
}

py::object jagged_separate_plan(bool interleave, py::handle plain, py::handle values, py::handle offsets,
                                py::handle totals) {
    const char* const op = op_of(true, interleave);
    const List parts(op, "offsets", "a list of tensors", offsets);
    if (!is_plain(plain, values) || !are_plain(plain, parts)) return py::none();
    const std::string expected = "a list of " + std::to_string(parts.size()) + " sizes like offsets";
    const List sizes(op, "totals", expected.c_str(), totals);
    if (sizes.size() != parts.size())
        fail<std::invalid_argument>("hstu_ext.", op, ": totals must be ", expected, ", got ", sizes.size());
    const Tensor x = read_tensor(op, "values", values);
    py::tuple shapes(sizes.size());
    for (Py_ssize_t i = 0; i < sizes.size(); ++i) shapes[i] = shape_of({read_size(op, "totals", sizes[i], i)}, x, 1);
    return py::make_tuple(shapes, requires_gradient(values));
}

// `size` is the total of the jagged rows or the length of the dense ones.
py::object jagged_dense_plan(bool to_jagged, py::handle plain, py::handle input, py::handle offsets, py::handle size) {
    if (!is_plain(plain, input) || !is_plain(plain, offsets)) return py::none();
    const char* const op = to_jagged ? "dense_to_jagged" : "jagged_to_dense";
    const Tensor x = read_tensor(op, to_jagged ? "dense" : "values", input);
    const int64_t rows = read_size(op, to_jagged ? "total" : "max_len", size);
    const int64_t batch = std::max<int64_t>(read_tensor(op, "offsets", offsets).shape[0] - 1, 0);
    return py::make_tuple(to_jagged ? shape_of({rows}, x, 2) : shape_of({batch, rows}, x, 1), requires_gradient(input));
}

}  // namespace

void register_jagged(py::module_& m) {
    m.def("jagged_join", &jagged_join);
    m.def("jagged_dense", &jagged_dense);
    m.def("jagged_sizes", &jagged_sizes);
    m.def("jagged_join_plan", &jagged_join_plan);
    m.def("jagged_separate_plan", &jagged_separate_plan);
    m.def("jagged_dense_plan", &jagged_dense_plan);
}

}  // namespace hstu::jagged
