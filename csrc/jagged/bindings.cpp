// hstu_ext._C.jagged_*. Arguments are positional; python/hstu_ext/_C.pyi gives their names and types.
#include "jagged/bindings.h"

#include <algorithm>
#include <initializer_list>

#include "common/arguments.h"
#include "common/check.h"
#include "common/torch_calls.h"
#include "jagged/jagged.h"

namespace py = pybind11;

namespace hstu::jagged {
namespace {

const char* op_of(bool split, bool interleave) {
    if (split) return interleave ? "jagged_deinterleave" : "jagged_split";
    return interleave ? "jagged_interleave" : "jagged_concat";
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

// A call of an op: it allocates the results, runs and returns them. In Python, each look at a tensor takes as long as all
// that is done here before the copy. With a set of tensor types `plain`, a call may return what to do instead:
//   None: a tensor is of another type, and torch.library must see the call
//   True: autograd must record it
// Without (None) it is past both questions.

bool is_plain(py::handle plain, py::handle tensor) {
    return plain.is_none() || PySet_Contains(plain.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))) == 1;
}

bool are_plain(py::handle plain, const List& tensors) {
    for (Py_ssize_t i = 0; i < tensors.size(); ++i)
        if (!is_plain(plain, tensors[i])) return false;
    return true;
}

bool is_recorded(py::handle plain, py::handle tensor) {
    return !plain.is_none() && torch_calls::requires_grad(tensor) && torch_calls::is_grad_enabled();
}

bool are_recorded(py::handle plain, const List& tensors) {
    for (Py_ssize_t i = 0; i < tensors.size(); ++i)
        if (is_recorded(plain, tensors[i])) return true;
    return false;
}

std::vector<Tensor> read_tensors(const char* op, const char* name, const List& list) {
    std::vector<Tensor> found(static_cast<size_t>(list.size()));
    for (Py_ssize_t i = 0; i < list.size(); ++i) found[i] = read_tensor(op, name, list[i]);
    return found;
}

// The sizes, then the dimensions of x from `first` on.
std::vector<int64_t> shape_of(std::initializer_list<int64_t> sizes, const Tensor& x, int first) {
    std::vector<int64_t> shape(sizes);
    for (int dim = first; dim < x.rank; ++dim) shape.push_back(x.shape[dim]);
    return shape;
}

void run(const JoinInputs& inputs, int device) {
    const Execution execution = torch_calls::execution_on(device);
    const py::gil_scoped_release no_gil;
    join(inputs, execution);
}

void run(const DenseInputs& inputs) {
    const Execution execution = torch_calls::execution_on(inputs.values.device);
    const py::gil_scoped_release no_gil;
    dense(inputs, execution);
}

py::object jagged_join(py::handle plain, bool interleave, py::handle values, py::handle offsets, py::handle total,
                       py::object joined_offsets) {
    const char* const op = op_of(false, interleave);
    const List parts(op, "values", "a list of tensors", values);
    const List own_offsets(op, "offsets", "a list of tensors", offsets);
    check_part_count(op, "values", parts.size());
    check_offsets_count(op, parts.size(), own_offsets.size());
    if (!are_plain(plain, parts) || !are_plain(plain, own_offsets)) return py::none();
    if (are_recorded(plain, parts)) return py::bool_(true);

    JoinInputs inputs;
    inputs.op = op;
    inputs.order = interleave ? Order::kInterleave : Order::kConcat;
    inputs.split = false;
    inputs.parts = read_tensors(op, "values", parts);
    inputs.offsets = read_tensors(op, "offsets", own_offsets);
    int64_t rows = 0;
    for (const Tensor& x : inputs.parts) rows += x.shape[0];
    if (!total.is_none()) rows = read_size(op, "total", total);
    const auto joined = torch_calls::new_empty(op, parts[0], inputs.parts[0], shape_of({rows}, inputs.parts[0], 1));
    inputs.joined = joined.tensor;
    if (joined_offsets.is_none()) {
        const Tensor& model = inputs.offsets[0];
        auto sums = torch_calls::new_empty(op, own_offsets[0], model, shape_of({}, model, 0));
        joined_offsets = std::move(sums.object);
        inputs.joined_offsets = sums.tensor;
    } else {
        inputs.joined_offsets = read_tensor(op, "joined offsets", joined_offsets);
    }
    run(inputs, inputs.joined.device);
    return py::make_tuple(joined.object, joined_offsets);
}

[[noreturn]] void fail_totals(const char* op, Py_ssize_t parts, py::handle totals) {
    const std::string expected = "a list of " + std::to_string(parts) + " sizes like offsets";
    const List sizes(op, "totals", expected.c_str(), totals);
    fail<std::invalid_argument>("hstu_ext.", op, ": totals must be ", expected, ", got ", sizes.size());
}

py::object jagged_separate(py::handle plain, bool interleave, py::handle values, py::handle offsets,
                           py::handle totals) {
    const char* const op = op_of(true, interleave);
    const List own_offsets(op, "offsets", "a list of tensors", offsets);
    if (!is_plain(plain, values) || !are_plain(plain, own_offsets)) return py::none();
    const bool is_list = PyList_Check(totals.ptr()) || PyTuple_Check(totals.ptr());
    if (!is_list || PySequence_Fast_GET_SIZE(totals.ptr()) != own_offsets.size())
        fail_totals(op, own_offsets.size(), totals);
    const List sizes(op, "totals", "a list", totals);
    if (is_recorded(plain, values)) return py::bool_(true);

    JoinInputs inputs;
    inputs.op = op;
    inputs.order = interleave ? Order::kInterleave : Order::kConcat;
    inputs.split = true;
    inputs.joined = read_tensor(op, "values", values);
    inputs.offsets = read_tensors(op, "offsets", own_offsets);
    py::list parts(sizes.size());
    for (Py_ssize_t i = 0; i < sizes.size(); ++i) {
        const int64_t rows = read_size(op, "totals", sizes[i], i);
        auto part = torch_calls::new_empty(op, values, inputs.joined, shape_of({rows}, inputs.joined, 1));
        parts[i] = std::move(part.object);
        inputs.parts.push_back(part.tensor);
    }
    run(inputs, inputs.joined.device);
    return parts;
}

// `size` is the total of the jagged rows or the length of the dense ones.
py::object jagged_dense(py::handle plain, bool to_jagged, py::handle input, py::handle offsets, py::handle size,
                        int64_t padding) {
    if (!is_plain(plain, input) || !is_plain(plain, offsets)) return py::none();
    if (is_recorded(plain, input)) return py::bool_(true);

    DenseInputs inputs;
    inputs.op = to_jagged ? "dense_to_jagged" : "jagged_to_dense";
    inputs.to_jagged = to_jagged;
    inputs.padding = padding;
    const Tensor x = read_tensor(inputs.op, to_jagged ? "dense" : "values", input);
    const int64_t rows = read_size(inputs.op, to_jagged ? "total" : "max_len", size);
    inputs.offsets = read_tensor(inputs.op, "offsets", offsets);
    const int64_t batch = std::max<int64_t>(inputs.offsets.shape[0] - 1, 0);
    auto out =
        torch_calls::new_empty(inputs.op, input, x, to_jagged ? shape_of({rows}, x, 2) : shape_of({batch, rows}, x, 1));
    inputs.dense = to_jagged ? x : out.tensor;
    inputs.values = to_jagged ? out.tensor : x;
    run(inputs);
    return out.object;
}

}  // namespace

void register_jagged(py::module_& m) {
    m.def("jagged_join", &jagged_join);
    m.def("jagged_separate", &jagged_separate);
    m.def("jagged_dense", &jagged_dense);
    m.def("jagged_sizes", &jagged_sizes);
}

}  // namespace hstu::jagged
