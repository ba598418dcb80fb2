// What C++ asks of torch in the middle of a call, through Python: no torch header or library is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/execution.h"

namespace hstu::torch_calls {

// tensor.new_empty(*shape)
pybind11::object new_empty(pybind11::handle tensor, const std::vector<int64_t>& shape);

bool requires_grad(pybind11::handle tensor);
bool is_grad_enabled();

// The current stream of a GPU, or the threads that torch would use on the CPU (-1).
Execution execution_on(int device);

}  // namespace hstu::torch_calls
