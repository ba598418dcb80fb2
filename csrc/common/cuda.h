// The few CUDA runtime calls of the host side: errors, the current device, what a device is.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

namespace hstu {

// What to do about an error whose own text does not say it.
inline const char* advice(cudaError_t status) {
    switch (status) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion: return "; build with this GPU's architecture in HSTU_EXT_ARCHS";
        default: return "";
    }
}

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // else the next launch would be blamed for it
    throw std::runtime_error(std::string("hstu_ext: ") + what + " failed: " + cudaGetErrorString(status) +
                             advice(status));
}

// Makes `device` current until the end of the scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device_ != previous_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_, previous_ = -1;
};

// An attribute of a device, asked for once.
template <cudaDeviceAttr kAttribute>
int device_attribute(int device) {
    static std::array<std::atomic<int>, 64> known{};  // the value + 1
    std::atomic<int>& cached = known[device % known.size()];
    int value = cached.load(std::memory_order_relaxed) - 1;
    if (value < 0) {
        check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
        cached.store(value + 1, std::memory_order_relaxed);
    }
    return value;
}

// 80 for compute capability 8.0.
inline int compute_capability(int device) {
    return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>(device) +
           device_attribute<cudaDevAttrComputeCapabilityMinor>(device);
}

inline int multiprocessors(int device) { return device_attribute<cudaDevAttrMultiProcessorCount>(device); }
inline int l2_cache_bytes(int device) { return device_attribute<cudaDevAttrL2CacheSize>(device); }

}  // namespace hstu
