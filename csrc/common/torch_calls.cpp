#include "common/torch_calls.h"

#include <algorithm>
#include <array>

#include "common/arguments.h"

namespace py = pybind11;

namespace hstu::torch_calls {
namespace {

constexpr int64_t kSmallBytes = 1 << 20;

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

// Nothing where the result is not small, or this torch has no such function.
py::object small_empty(py::handle tensor, const Tensor& like, const std::vector<int64_t>& shape) {
    static PyObject *functions = nullptr, *cuda = nullptr, *cpu = nullptr, *dtype = nullptr;
    const int64_t bytes = size_of(like.dtype);
    int64_t stride = 1;
    py::tuple sizes(shape.size()), strides(shape.size());
    for (size_t i = shape.size(); i-- > 0;) {
        const int64_t size = std::max<int64_t>(shape[i], 1);
        if (size > kSmallBytes / (stride * bytes)) return {};
        sizes[i] = shape[i];
        strides[i] = stride;
        stride *= size;
    }
    if (!functions) {
        try {
            functions = py::object(py::module_::import("torch._C._dynamo.guards")).release().ptr();
        } catch (py::error_already_set&) {
            functions = py::none().release().ptr();
        }
    }
    PyObject* const name = like.is_cuda() ? interned(cuda, "_empty_strided_cuda") : interned(cpu, "_empty_strided_cpu");
    const py::object function = py::reinterpret_steal<py::object>(PyObject_GetAttr(functions, name));
    if (!function) {
        PyErr_Clear();
        return {};
    }
    const py::object type = owned(PyObject_GetAttr(tensor.ptr(), interned(dtype, "dtype")));
    PyObject* const arguments[] = {sizes.ptr(), strides.ptr(), type.ptr()};
    return owned(PyObject_Vectorcall(function.ptr(), arguments, 3, nullptr));
}

py::object method_empty(py::handle tensor, const std::vector<int64_t>& shape) {
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

}  // namespace

Allocated new_empty(const char* op, py::handle tensor, const Tensor& like, const std::vector<int64_t>& shape) {
    py::object object = shape.size() <= Tensor::kMaxRank ? small_empty(tensor, like, shape) : py::object();
    if (object) {
        const Tensor found = read_tensor(op, "out", object);
        if (found.device == like.device) return {object, found};  // it takes the current device
    }
    object = method_empty(tensor, shape);
    return {object, read_tensor(op, "out", object)};
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
