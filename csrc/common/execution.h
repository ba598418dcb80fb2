// Where and how a call runs, and the error where it cannot.
#pragma once

#include <stdexcept>

namespace hstu {

// `stream` is a cudaStream_t; `num_threads` is for the CPU.
struct Execution {
    void* stream;
    int num_threads;
};

// The kernel that this call needs was not compiled.
struct MissingKernelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace hstu
