#pragma once

#include <pybind11/pybind11.h>

namespace hstu::similarity {

void register_similarity(pybind11::module_& m);

}  // namespace hstu::similarity
