// What C++ asks of torch in the middle of a call, through Python: no torch header or library is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/execution.h"
#include "common/tensor.h"

namespace hstu::torch_calls {

struct Allocated {
    pybind11::object object;
    Tensor tensor;
};

// tensor.new_empty(*shape), contiguous; `like` is what was read of the tensor. Up to 1 MB, where its time counts, it is the
// function that torch.compile's own code allocates with, if this torch has it: half of the time of new_empty.
Allocated new_empty(const char* op, pybind11::handle tensor, const Tensor& like, const std::vector<int64_t>& shape);

bool requires_grad(pybind11::handle tensor);
bool is_grad_enabled();

// The current stream of a GPU, or the threads that torch would use on the CPU (-1).
Execution execution_on(int device);

}  // namespace hstu::torch_calls
