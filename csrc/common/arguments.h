// Positional Python arguments, read in order and by name: `Arguments args("attention", tuple); args.tensor("q")`.
// torch.Tensor becomes hstu::Tensor through DLPack's C functions or its Python attributes, so that no torch header or
// library is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/execution.h"
#include "common/tensor.h"

namespace hstu {

// A Python list or tuple, borrowed.
class List {
  public:
    List(const char* op, const char* name, const char* expected, pybind11::handle source);

    Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(source_); }
    PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(source_, i); }

  private:
    PyObject* source_;
};

Tensor read_tensor(const char* op, const char* name, pybind11::handle source);  // None gives an undefined tensor

// An int, and not a bool, of 0 or more. index: where it is an element of the list `name`.
int64_t read_size(const char* op, const char* name, pybind11::handle source, Py_ssize_t index = -1);

class Arguments {
  public:
    Arguments(const char* op, pybind11::args values) : op_(op), values_(std::move(values)) {}

    Tensor tensor(const char* name);  // None gives an undefined tensor
    std::vector<Tensor> tensors(const char* name);
    int64_t integer(const char* name);
    double number(const char* name);
    bool boolean(const char* name) { return integer(name) != 0; }
    Execution execution();  // two integers: the stream and the number of threads

  private:
    PyObject* next();

    const char* op_;
    pybind11::args values_;
    Py_ssize_t position_ = 0;
};

}  // namespace hstu
