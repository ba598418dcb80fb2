// Positional Python arguments, read in order and by name: `Arguments args("attention", tuple); args.tensor("q")`.
// torch.Tensor becomes hstu::Tensor through its Python attributes, so that no torch header or library is needed. That
// costs about a third of a microsecond: names are interned and dtypes are compared by address.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/execution.h"
#include "common/tensor.h"

namespace hstu {

class Arguments {
  public:
    Arguments(const char* op, pybind11::args values) : op_(op), values_(std::move(values)) {}

    Tensor tensor(const char* name);  // None gives an undefined tensor
    int64_t integer(const char* name);
    double number(const char* name);
    bool boolean(const char* name) { return integer(name) != 0; }
    Execution execution();  // two integers: the stream and the number of threads

  private:
    PyObject* next();
    [[noreturn]] void fail_type(const char* name, const char* expected, PyObject* got) const;

    const char* op_;
    pybind11::args values_;
    Py_ssize_t position_ = 0;
};

}  // namespace hstu
