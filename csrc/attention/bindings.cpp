// hstu_ext._C.attention_*. Arguments are positional; python/hstu_ext/_C.pyi gives their names and types.
#include "attention/bindings.h"

#include "attention/api.h"
#include "common/arguments.h"

#if HSTU_EXT_CUDA
#include "attention/dispatch.h"
#endif

namespace py = pybind11;

namespace hstu::attention {
namespace {

void read_differentiable(Arguments& args, Inputs& inputs) {
    inputs.q = args.tensor("q");
    inputs.k = args.tensor("k");
    inputs.v = args.tensor("v");
    inputs.rab = args.tensor("rab");
    inputs.position_table = args.tensor("position_table");
    inputs.time_table = args.tensor("time_table");
}

void read_problem(Arguments& args, Inputs& inputs) {
    inputs.cu_seqlens_q = args.tensor("cu_seqlens_q");
    inputs.cu_seqlens_k = args.tensor("cu_seqlens_k");
    inputs.max_seqlen_q = args.integer("max_seqlen_q");
    inputs.max_seqlen_k = args.integer("max_seqlen_k");
    inputs.num_contexts = args.tensor("num_contexts");
    inputs.num_targets = args.tensor("num_targets");
    inputs.target_group_size = args.integer("target_group_size");
    inputs.window_left = args.integer("window_size");
    inputs.window_right = args.integer("window_size");
    inputs.alpha = args.number("alpha");
    inputs.func = args.tensor("func");
    inputs.scaling_seqlen = args.integer("scaling_seqlen");
    inputs.seqused_q = args.tensor("seqused_q");
    inputs.seqused_k = args.tensor("seqused_k");
    inputs.query_times = args.tensor("query_times");
    inputs.key_times = args.tensor("key_times");
}

void attention_forward(py::args values) {
    Arguments args("attention", std::move(values));
    Inputs inputs;
    read_differentiable(args, inputs);
    const Tensor out = args.tensor("out");
    read_problem(args, inputs);
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    forward(inputs, out, execution);
}

void attention_backward(py::args values) {
    Arguments args("attention", std::move(values));
    Inputs inputs;
    Gradients gradients;
    gradients.dout = args.tensor("dout");
    read_differentiable(args, inputs);
    gradients.dq = args.tensor("dq");
    gradients.dk = args.tensor("dk");
    gradients.dv = args.tensor("dv");
    gradients.drab = args.tensor("drab");
    gradients.dposition = args.tensor("dposition");
    gradients.dtime = args.tensor("dtime");
    gradients.dq_accum = args.tensor("dq_accum");
    gradients.table_accum = args.tensor("table_accum");
    read_problem(args, inputs);
    const bool deterministic = args.boolean("deterministic");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    backward(inputs, gradients, deterministic, execution);
}

int64_t attention_backward_scratch(py::args values) {
    Arguments args("attention", std::move(values));
    const Tensor q = args.tensor("q"), v = args.tensor("v"), cu_seqlens_q = args.tensor("cu_seqlens_q");
    const int64_t max_seqlen_k = args.integer("max_seqlen_k");
    return backward_scratch(q, v, cu_seqlens_q, max_seqlen_k, args.boolean("deterministic"));
}

int64_t attention_table_scratch(py::args values) {
    Arguments args("attention", std::move(values));
    const Tensor dposition = args.tensor("dposition"), dtime = args.tensor("dtime");
    return table_scratch(dposition, dtime);
}

py::list cell_names() {
    py::list names;
#if HSTU_EXT_CUDA
    for (const Cell& cell : cells()) names.append(cell.name);
#endif
    return names;
}

}  // namespace

void register_attention(py::module_& m) {
    py::register_exception<MisalignedError>(m, "MisalignedError", PyExc_ValueError);
    m.def("cells", &cell_names, "Names of the GPU kernels in this build.");
    m.def("attention_forward", &attention_forward);
    m.def("attention_backward", &attention_backward);
    m.def("attention_backward_scratch", &attention_backward_scratch);
    m.def("attention_table_scratch", &attention_table_scratch);
}

}  // namespace hstu::attention
