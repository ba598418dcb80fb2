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
    uint64_t multiplier;  // ceil(2^64 / divisor), exact for every 31-bit dividend; 0 for a divisor of 1

    explicit FastDivisor(int divisor) : divisor(divisor), multiplier(UINT64_MAX / static_cast<uint32_t>(divisor) + 1) {}

    // Of 0 <= n < 2^31.
    HSTU_HOST_DEVICE Result divide(int n) const {
        const int quotient = divisor == 1 ? n : static_cast<int>(high_product(multiplier, static_cast<uint64_t>(n)));
        return {quotient, n - quotient * divisor};
    }

  private:
    HSTU_HOST_DEVICE static uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
        return __umul64hi(a, b);
#else
        return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
    }
};

}  // namespace hstu
