// hstu_ext._C.jagged_*. Arguments are positional; python/hstu_ext/_C.pyi gives their names and types.
#include "jagged/bindings.h"

#include "common/arguments.h"
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
    const Execution execution = args.execution();
    const int64_t count = args.integer("parts");
    for (int64_t i = 0; i < count; ++i) inputs.parts.push_back(args.tensor("values"));
    for (int64_t i = 0; i < count; ++i) inputs.offsets.push_back(args.tensor("offsets"));
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

}  // namespace

void register_jagged(py::module_& m) {
    m.def("jagged_join", &jagged_join);
    m.def("jagged_dense", &jagged_dense);
    m.def("jagged_sizes", &jagged_sizes);
}

}  // namespace hstu::jagged
