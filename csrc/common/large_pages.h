// Large pages for an output that is about to be written for the first time. A system that hands out memory page by page
// takes longer for the faults of a large output than the kernel for its elements; Linux makes pages of 2 MB where it is
// asked to.
#pragma once

#include "common/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hstu {

// out is [rows, dim] on the CPU, contiguous in dim. Only whole large pages inside of it are asked for: it takes no more
// memory than without. Where the system has none, nothing changes.
inline void prefer_large_pages([[maybe_unused]] const Tensor& out) {
#ifdef __linux__
    constexpr uintptr_t kPage = uintptr_t{1} << 21;
    if (out.is_cuda() || out.shape[0] == 0 || out.shape[1] == 0) return;
    const int64_t elements = (out.shape[0] - 1) * out.stride[0] + out.shape[1];
    const auto begin = reinterpret_cast<uintptr_t>(out.data);
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t end = (begin + static_cast<uintptr_t>(elements) * size_of(out.dtype)) / kPage * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace hstu
