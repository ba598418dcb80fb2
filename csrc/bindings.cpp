// The Python module hstu_ext._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/bindings.h"
#include "attention/cpu/attention.h"
#include "build_info.h"
#include "common/execution.h"
#include "jagged/bindings.h"
#include "norm/bindings.h"
#include "similarity/bindings.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = hstu::build::kVersion;
    info["compiler"] = hstu::build::kCompiler;
    info["cuda"] = hstu::build::kCuda;
    info["cutlass"] = hstu::build::kCutlass;
    info["archs"] = py::str(hstu::build::kArchs).attr("split")();
    info["set"] = hstu::build::kSet;
    info["cpu_variants"] = hstu::attention::cpu::built_variants();
    info["cpu_variant"] = hstu::attention::cpu::selected_variant();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of hstu_ext. Private: use the functions of the hstu_ext package.";
    py::register_exception<hstu::MissingKernelError>(m, "MissingKernelError", PyExc_RuntimeError);
    m.def("build_info", &build_info, "Versions, architectures and the kernel set of this build.");
    hstu::attention::register_attention(m);
    hstu::jagged::register_jagged(m);
    hstu::norm::register_norm(m);
    hstu::similarity::register_similarity(m);
}
