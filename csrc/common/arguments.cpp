#include "common/arguments.h"

#include <string>

#include "common/check.h"
#include "common/dlpack.h"

namespace py = pybind11;

namespace hstu {
namespace {

// Never freed: a static py::object would be destroyed after the interpreter is gone.
PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

struct Names {
    PyObject* shape = intern("shape");
    PyObject* stride = intern("stride");
    PyObject* dtype = intern("dtype");
    PyObject* data_ptr = intern("data_ptr");
    PyObject* get_device = intern("get_device");
    PyObject* is_cuda = intern("is_cuda");
    PyObject* is_cpu = intern("is_cpu");
    PyObject* exchange_api = intern("__dlpack_c_exchange_api__");
};

py::object owned(PyObject* value) {
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

py::object attribute(PyObject* source, PyObject* name) { return owned(PyObject_GetAttr(source, name)); }
py::object find_attribute(PyObject* source, PyObject* name) {
    PyObject* value = PyObject_GetAttr(source, name);
    if (!value) PyErr_Clear();
    return py::reinterpret_steal<py::object>(value);
}
py::object call(PyObject* source, PyObject* method) { return owned(PyObject_CallMethodNoArgs(source, method)); }

int64_t to_int64(PyObject* number) {
    const long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// torch's dtypes are singletons: each is read from its text once and known by its address from then on.
bool find_dtype(PyObject* object, DType& dtype) {
    static struct {
        PyObject* object;
        DType dtype;
    } known[8];
    static int known_count = 0;  // the GIL guards both
    for (int i = 0; i < known_count; ++i)
        if (known[i].object == object) return dtype = known[i].dtype, true;

    const std::string text = py::str(object);
    for (DType candidate : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16, DType::kInt32,
                            DType::kInt64, DType::kBool}) {
        if (text == std::string("torch.") + name_of(candidate)) {
            Py_INCREF(object);
            known[known_count++] = {object, candidate};
            return dtype = candidate, true;
        }
    }
    return false;
}

// The functions with which this type hands out its tensors, or nullptr: torch has them since 2.10.
const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type, PyObject* attribute_name) {
    static struct {
        PyTypeObject* type;
        const dlpack::ExchangeApi* api;
    } known[4];
    static int known_count = 0;  // the GIL guards both
    for (int i = 0; i < known_count; ++i)
        if (known[i].type == type) return known[i].api;

    const dlpack::ExchangeApi* api = nullptr;
    const py::object capsule = find_attribute(reinterpret_cast<PyObject*>(type), attribute_name);
    if (capsule && PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) {
        api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
        while (api && api->version.major != dlpack::kMajorVersion) api = api->previous;
        if (api && !api->tensor_from_py_object) api = nullptr;
    }
    if (known_count < 4) {
        Py_INCREF(type);
        known[known_count++] = {type, api};
    }
    return api;
}

bool find_dtype(dlpack::DLDataType from, DType& dtype) {
    if (from.lanes != 1) return false;
    const int key = from.code * 256 + from.bits;
    switch (key) {
        case dlpack::kFloat * 256 + 16: return dtype = DType::kFloat16, true;
        case dlpack::kFloat * 256 + 32: return dtype = DType::kFloat32, true;
        case dlpack::kFloat * 256 + 64: return dtype = DType::kFloat64, true;
        case dlpack::kBfloat * 256 + 16: return dtype = DType::kBFloat16, true;
        case dlpack::kInt * 256 + 32: return dtype = DType::kInt32, true;
        case dlpack::kInt * 256 + 64: return dtype = DType::kInt64, true;
        case dlpack::kBool * 256 + 8: return dtype = DType::kBool, true;
        default: return false;
    }
}

// Reads a tensor in tens of nanoseconds. False where the type has no such functions, or the tensor is unusual: then the
// attributes tell, or what is wrong.
bool read_by_exchange_api(PyObject* source, PyObject* attribute_name, Tensor& tensor) {
    const dlpack::ExchangeApi* const api = exchange_api_of(Py_TYPE(source), attribute_name);
    if (!api) return false;
    dlpack::DLTensor view;
    if (api->tensor_from_py_object(source, &view) != 0) {
        PyErr_Clear();
        return false;
    }
    const bool is_cuda = view.device.type == dlpack::kCuda;
    if ((!is_cuda && view.device.type != dlpack::kCpu) || view.ndim > Tensor::kMaxRank || !view.strides ||
        !find_dtype(view.dtype, tensor.dtype))
        return false;
    tensor.data = static_cast<char*>(view.data) + view.byte_offset;
    tensor.rank = view.ndim;
    tensor.device = is_cuda ? view.device.id : -1;
    for (int i = 0; i < view.ndim; ++i) {
        tensor.shape[i] = view.shape[i];
        tensor.stride[i] = view.strides[i];
    }
    return tensor.defined = true;
}

[[noreturn]] void fail_type(const char* op, const char* name, const char* expected, PyObject* got) {
    fail<py::type_error>("hstu_ext.", op, ": ", name, " must be ", expected, ", got ", Py_TYPE(got)->tp_name);
}

}  // namespace

List::List(const char* op, const char* name, const char* expected, py::handle source) : source_(source.ptr()) {
    if (!PyList_Check(source_) && !PyTuple_Check(source_)) fail_type(op, name, expected, source_);
}

Tensor read_tensor(const char* op, const char* name, py::handle object) {
    static const Names* const names = new Names;
    PyObject* const source = object.ptr();
    Tensor tensor;
    if (source == Py_None || read_by_exchange_api(source, names->exchange_api, tensor)) return tensor;
    const py::object data_ptr = find_attribute(source, names->data_ptr);
    if (!data_ptr) fail_type(op, name, "a tensor", source);

    const py::object shape = attribute(source, names->shape), stride = call(source, names->stride);
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
    if (rank > Tensor::kMaxRank)
        fail<std::invalid_argument>("hstu_ext.", op, ": ", name, " must have at most ", Tensor::kMaxRank,
                                    " dimensions, got ", rank);
    tensor.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
        tensor.shape[i] = to_int64(PyTuple_GET_ITEM(shape.ptr(), i));
        tensor.stride[i] = to_int64(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    const py::object dtype = attribute(source, names->dtype);
    if (!find_dtype(dtype.ptr(), tensor.dtype))
        fail<std::invalid_argument>("hstu_ext.", op, ": ", name, " must be of a supported type, got ",
                                    std::string(py::str(dtype)));
    tensor.device = static_cast<int>(to_int64(call(source, names->get_device).ptr()));
    if (attribute(source, tensor.device < 0 ? names->is_cpu : names->is_cuda).ptr() != Py_True)
        fail<std::invalid_argument>("hstu_ext.", op, ": ", name, " must be on cpu or cuda, got ",
                                    std::string(py::str(py::handle(source).attr("device"))));
    tensor.data = PyLong_AsVoidPtr(owned(PyObject_CallNoArgs(data_ptr.ptr())).ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    tensor.defined = true;
    return tensor;
}

int64_t read_size(const char* op, const char* name, py::handle source, Py_ssize_t index) {
    const auto full = [&] { return index < 0 ? name : std::string(name) + '[' + std::to_string(index) + ']'; };
    if (!PyLong_Check(source.ptr()) || PyBool_Check(source.ptr()))
        fail_type(op, full().c_str(), "an int", source.ptr());
    const int64_t value = to_int64(source.ptr());
    if (value < 0) fail<std::invalid_argument>("hstu_ext.", op, ": ", full(), " must be 0 or more, got ", value);
    return value;
}

PyObject* Arguments::next() {
    if (position_ >= static_cast<Py_ssize_t>(values_.size()))
        throw py::type_error(std::string("hstu_ext.") + op_ + ": too few arguments");
    return PyTuple_GET_ITEM(values_.ptr(), position_++);
}

Tensor Arguments::tensor(const char* name) { return read_tensor(op_, name, next()); }

std::vector<Tensor> Arguments::tensors(const char* name) {
    const List list(op_, name, "a list of tensors", next());
    std::vector<Tensor> found(static_cast<size_t>(list.size()));
    for (Py_ssize_t i = 0; i < list.size(); ++i) found[i] = read_tensor(op_, name, list[i]);
    return found;
}

int64_t Arguments::integer(const char* name) {
    PyObject* const source = next();
    const long long value = PyLong_AsLongLong(source);
    if (value == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError))
            throw py::error_already_set();
        PyErr_Clear();
        fail_type(op_, name, "a 64-bit int", source);
    }
    return value;
}

double Arguments::number(const char* name) {
    PyObject* const source = next();
    const double value = PyFloat_AsDouble(source);
    if (value == -1.0 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
        PyErr_Clear();
        fail_type(op_, name, "a float", source);
    }
    return value;
}

Execution Arguments::execution() {
    const int64_t stream = integer("stream"), num_threads = integer("num_threads");
    return {reinterpret_cast<void*>(stream), static_cast<int>(num_threads)};
}

}  // namespace hstu
