#pragma once

#include <pybind11/pybind11.h>

namespace hstu::jagged {

void register_jagged(pybind11::module_& m);

}  // namespace hstu::jagged
