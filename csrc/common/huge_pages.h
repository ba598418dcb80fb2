// Huge pages for large results on the CPU.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hstu {

constexpr int64_t kHugePageBytes = 2 << 20;

// Before the first write to fresh memory: 2 MB a page fault instead of 4 KB, where the system leaves the choice to the
// process (transparent_hugepage/enabled is madvise). Only whole huge pages inside of it, so no memory is added. A system
// that refuses does what it would have done.
inline void advise_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__)
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHugePageBytes * kHugePageBytes;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace hstu
