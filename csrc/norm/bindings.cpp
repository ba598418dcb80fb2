// hstu_ext._C.gated_norm*. Arguments are positional; python/hstu_ext/_C.pyi gives their names and types.
#include "norm/bindings.h"

#include "common/arguments.h"
#include "norm/norm.h"

namespace py = pybind11;

namespace hstu::norm {
namespace {

void bind_forward(py::args values) {
    Arguments args("gated_norm", std::move(values));
    const Tensor x = args.tensor("x"), gate = args.tensor("gate"), out = args.tensor("out");
    const Tensor statistics = args.tensor("statistics");
    const double eps = args.number("eps");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    forward(x, gate, out, statistics, eps, execution);
}

void bind_backward(py::args values) {
    Arguments args("gated_norm", std::move(values));
    const Tensor dout = args.tensor("dout"), x = args.tensor("x"), gate = args.tensor("gate");
    const Tensor statistics = args.tensor("statistics"), dx = args.tensor("dx"), dgate = args.tensor("dgate");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    backward(dout, x, gate, statistics, dx, dgate, execution);
}

}  // namespace

void register_norm(py::module_& m) {
    m.def("gated_norm", &bind_forward);
    m.def("gated_norm_backward", &bind_backward);
}

}  // namespace hstu::norm
