// The part of DLPack's C ABI (version 1) that reads a tensor in place: a table of functions that a tensor type offers in
// its attribute __dlpack_c_exchange_api__. See https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace hstu::dlpack {

constexpr int kCpu = 1, kCuda = 2;                           // DLDevice::type
constexpr int kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;  // DLDataType::code
constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

struct DLDevice {
    int32_t type, id;
};

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;    // [ndim]
    int64_t* strides;  // [ndim], in elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    ExchangeApi* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*tensor_from_py_object)(void* object, DLTensor* out);  // borrows: valid while the object lives; may be nullptr
    void* current_work_stream;
};

}  // namespace hstu::dlpack
