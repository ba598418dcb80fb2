// A view of a tensor that lives elsewhere: what the host side knows of a torch.Tensor.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace hstu {

struct Tensor {
    static constexpr int kMaxRank = 8;

    void* data = nullptr;
    int64_t shape[kMaxRank] = {};
    int64_t stride[kMaxRank] = {};  // in elements
    int rank = 0;
    int device = -1;  // CUDA device, -1 for CPU
    DType dtype = DType::kFloat32;
    bool defined = false;  // false: None was given

    explicit operator bool() const { return defined; }
    bool is_cuda() const { return device >= 0; }
};

}  // namespace hstu
