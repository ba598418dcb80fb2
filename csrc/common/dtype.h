// Element types of the tensors that cross the Python boundary.
#pragma once

#include <cstdint>

namespace hstu {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kInt32, kInt64, kBool };

constexpr int size_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kFloat64: return 8;
        case DType::kFloat16: return 2;
        case DType::kBFloat16: return 2;
        case DType::kInt32: return 4;
        case DType::kInt64: return 8;
        case DType::kBool: return 1;
    }
    return 0;
}

// As torch prints it, without "torch."; also the dtype part of a cell's name.
constexpr const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kFloat64: return "float64";
        case DType::kFloat16: return "float16";
        case DType::kBFloat16: return "bfloat16";
        case DType::kInt32: return "int32";
        case DType::kInt64: return "int64";
        case DType::kBool: return "bool";
    }
    return "?";
}

}  // namespace hstu
