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

// 80 for compute capability 8.0. Read once per device.
inline int compute_capability(int device) {
    static std::array<std::atomic<int>, 64> known{};
    const bool cached = device < static_cast<int>(known.size());
    if (cached && known[device] > 0) return known[device];
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    if (cached) known[device] = 10 * major + minor;
    return 10 * major + minor;
}

}  // namespace hstu
