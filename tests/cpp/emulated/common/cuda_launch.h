// In the place of csrc/common/cuda_launch.h: runs the blocks one after another.
#pragma once

#include <stdexcept>
#include <string>

#include "emulator.h"

using cudaStream_t = void*;

namespace hstu {

inline int multiprocessors(int) { return emulated::multiprocessor_count; }

template <auto kKernel, class... Args>
void launch(int64_t blocks, int threads, int shared_bytes, int, cudaStream_t, const Args&... args) {
    if (shared_bytes > emulated::kSharedBytes) emulated::fail("too much shared memory");
    for (unsigned i = 0; i < blocks; ++i)
        emulated::run_block({i, 1, 1}, {static_cast<unsigned>(blocks), 1, 1}, threads, [&] { kKernel(args...); });
}

}  // namespace hstu
