#pragma once

#include <pybind11/pybind11.h>

namespace hstu::attention {

void register_attention(pybind11::module_& m);

}  // namespace hstu::attention
