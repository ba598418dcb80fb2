// A read-only int32 or int64 array whose width is known at run time (offsets, lengths, counts).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace hstu {

struct IndexArray {
    const void* data = nullptr;  // [n], int32 or int64; may be nullptr (absent)
    bool is_int64 = false;

    HSTU_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
    HSTU_HOST_DEVICE int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i]
                        : static_cast<int64_t>(static_cast<const int32_t*>(data)[i]);
    }
};

}  // namespace hstu
