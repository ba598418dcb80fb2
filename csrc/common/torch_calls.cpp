#include "common/torch_calls.h"

#include <array>

#include "common/tensor.h"

namespace py = pybind11;

namespace hstu::torch_calls {
namespace {

// Names and functions are looked up once and never freed; the GIL guards them. They are no static locals with
// initializers: an import may let another thread run, which would wait for the initialization with the GIL in hand.

PyObject* interned(PyObject*& name, const char* text) {
    if (!name) name = PyUnicode_InternFromString(text);
    return name;
}

PyObject* torch_function(PyObject*& function, const char* name) {
    if (!function) function = py::object(py::module_::import("torch._C").attr(name)).release().ptr();
    return function;
}

py::object owned(PyObject* value) {
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

}  // namespace

py::object new_empty(py::handle tensor, const std::vector<int64_t>& shape) {
    static PyObject* name = nullptr;
    std::array<py::object, Tensor::kMaxRank + 1> sizes;  // of a dense tensor, one more than its rows have
    std::array<PyObject*, Tensor::kMaxRank + 2> arguments{tensor.ptr()};
    if (shape.size() > sizes.size()) throw py::value_error("hstu_ext: a result would have too many dimensions");
    for (size_t i = 0; i < shape.size(); ++i) {
        sizes[i] = py::int_(shape[i]);
        arguments[i + 1] = sizes[i].ptr();
    }
    return owned(PyObject_VectorcallMethod(interned(name, "new_empty"), arguments.data(), shape.size() + 1, nullptr));
}

bool requires_grad(py::handle tensor) {
    static PyObject* name = nullptr;
    return owned(PyObject_GetAttr(tensor.ptr(), interned(name, "requires_grad"))).ptr() == Py_True;
}

bool is_grad_enabled() {
    static PyObject* function = nullptr;
    return owned(PyObject_CallNoArgs(torch_function(function, "is_grad_enabled"))).ptr() == Py_True;
}

Execution execution_on(int device) {
    if (device < 0) {
        static PyObject* function = nullptr;
        return {nullptr, owned(PyObject_CallNoArgs(torch_function(function, "get_num_threads"))).cast<int>()};
    }
#if HSTU_EXT_CUDA
    static PyObject* function = nullptr;
    const py::int_ index(device);
    const py::object stream =
        owned(PyObject_CallOneArg(torch_function(function, "_cuda_getCurrentRawStream"), index.ptr()));
    void* const address = PyLong_AsVoidPtr(stream.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return {address, 1};
#else
    return {nullptr, 1};  // it will be refused
#endif
}

}  // namespace hstu::torch_calls
