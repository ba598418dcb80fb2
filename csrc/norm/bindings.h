#pragma once

#include <pybind11/pybind11.h>

namespace hstu::norm {

void register_norm(pybind11::module_& m);

}  // namespace hstu::norm
