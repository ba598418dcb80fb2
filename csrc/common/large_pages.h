// Large pages for a CPU result that is about to be written for the first time.
#pragma once

#include <cstdint>

#include "common/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hstu {

constexpr int64_t kLargePageBytes = 2 << 20;

// 2 MB a page fault instead of 4 KB, where the system leaves the choice to the process
// (transparent_hugepage/enabled is madvise): the faults of a large result take longer than writing it. Only whole large
// pages inside of it are asked for, so no memory is added. A system that refuses does what it would have done.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (address + kLargePageBytes - 1) / kLargePageBytes * kLargePageBytes;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kLargePageBytes * kLargePageBytes;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// out is [rows, dim], contiguous in dim.
inline void prefer_large_pages(const Tensor& out) {
    if (out.is_cuda() || out.shape[0] == 0 || out.shape[1] == 0) return;
    prefer_large_pages(out.data, ((out.shape[0] - 1) * out.stride[0] + out.shape[1]) * size_of(out.dtype));
}

}  // namespace hstu
