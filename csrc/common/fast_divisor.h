// Division of block numbers by a divisor known at launch: one multiplication instead of some twenty instructions.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace hstu {

struct FastDivisor {
    struct Result {
        int quotient, remainder;
    };

    int divisor;
    uint64_t multiplier;  // ceil(2^32 / divisor)-style fixed point with enough bits for any 31-bit dividend

    explicit FastDivisor(int divisor) : divisor(divisor), multiplier(UINT64_MAX / static_cast<uint32_t>(divisor) + 1) {}

    HSTU_HOST_DEVICE Result divide(int n) const {
#if defined(__CUDA_ARCH__)
        const int quotient = divisor == 1 ? n : static_cast<int>(__umul64hi(multiplier, static_cast<uint64_t>(n)));
#else
        const int quotient = n / divisor;
#endif
        return {quotient, n - quotient * divisor};
    }
};

}  // namespace hstu
