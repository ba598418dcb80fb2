// Launching a kernel: raised shared-memory limits, the error check, the caller's stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
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

// Raises a kernel's limit on dynamic shared memory, once a kernel, device and size, so that launches are cheap and can be
// captured in a CUDA graph.
template <auto kKernel>
void reserve_shared(int shared_bytes, int device) {
    if (shared_bytes <= 48 * 1024) return;
    static std::array<std::atomic<int>, 64> reserved{};
    std::atomic<int>& most = reserved[device % reserved.size()];
    if (most.load(std::memory_order_relaxed) < shared_bytes) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                   "reserving shared memory for a kernel");
        most.store(shared_bytes, std::memory_order_relaxed);
    }
}

// Runs kernel<<<grid, threads, shared_bytes, stream>>>(args...).
template <auto kKernel, class... Args>
void launch_grid(dim3 grid, int threads, int shared_bytes, int device, cudaStream_t stream, const Args&... args) {
    reserve_shared<kKernel>(shared_bytes, device);
    kKernel<<<grid, threads, shared_bytes, stream>>>(args...);
    check_cuda(cudaGetLastError(), "a kernel launch");
}

// The same for a row of blocks; none is no launch.
template <auto kKernel, class... Args>
void launch(int64_t blocks, int threads, int shared_bytes, int device, cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("hstu_ext: too many thread blocks: " + std::to_string(blocks));
    launch_grid<kKernel>(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, device, stream, args...);
}

// The same for a kernel that may start while the one before it in the stream still runs, and touches no memory before it
// has called wait_for_previous_kernel().
template <auto kKernel, class... Args>
void launch_early(int64_t blocks, int threads, int shared_bytes, int device, cudaStream_t stream, const Args&... args) {
    if (blocks == 0) return;
    reserve_shared<kKernel>(shared_bytes, device);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), "a kernel launch");
}

}  // namespace hstu
