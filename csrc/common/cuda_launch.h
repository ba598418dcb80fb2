// Launching a kernel: raised shared-memory limits, the error check, the caller's stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/cuda.h"

namespace hstu {

// Shared memory that a block may ask for on this device: 99 to 227 KB. HSTU_EXT_MAX_SHARED_KB lowers it, so that the
// kernels of small GPUs can be tested on large ones.
inline int max_shared_bytes(int device) {
    static const char* const limit = std::getenv("HSTU_EXT_MAX_SHARED_KB");
    const int bytes = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
    return limit ? std::min(bytes, std::atoi(limit) * 1024) : bytes;
}

// Runs kernel<<<blocks, threads, shared_bytes, stream>>>(args...). The limit on dynamic shared memory is raised once a
// kernel and device, so that launches are cheap and can be captured in a CUDA graph.
template <auto kKernel, class... Args>
void launch(int64_t blocks, int threads, int shared_bytes, int device, cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("hstu_ext: too many thread blocks: " + std::to_string(blocks));
    if (shared_bytes > 48 * 1024) {
        static std::atomic<uint64_t> prepared{0};
        const uint64_t bit = uint64_t{1} << (device & 63);
        if (!(prepared.load(std::memory_order_relaxed) & bit)) {
            check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                       "reserving shared memory for a kernel");
            prepared.fetch_or(bit, std::memory_order_relaxed);
        }
    }
    kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args...);
    check_cuda(cudaGetLastError(), "a kernel launch");
}

}  // namespace hstu
