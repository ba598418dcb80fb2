// The bucket of a time difference on the GPU, by its quarter of an octave (time_bucket.h).
#pragma once

#include "attention/gpu.h"
#include "attention/time_bucket.h"

namespace hstu::attention {

struct TimeEdges {
    uint32_t at[kTimeBuckets];  // those that differences in 32 bits can reach

    constexpr TimeEdges() : at{} {
        for (int b = 0; b < kTimeBuckets; ++b)
            at[b] = kTimeEdges[b] < 0xffffffffu ? static_cast<uint32_t>(kTimeEdges[b]) : 0xffffffffu;
    }
};

static __device__ const TimeQuarters kQuartersOfTime{};
static __device__ const TimeEdges kEdgesOfTime{};

// The quarter of an octave that x >= 1 lies in: exponent and two bits of a float that is not rounded up.
__device__ __forceinline__ int quarter_of(float x) { return (__float_as_int(fmaxf(x, 1.0f)) >> 21) - (127 << 2); }

// x < 2^31
__device__ __forceinline__ int bucket_of(uint32_t x) {
    const uint2 quarter = __ldg(reinterpret_cast<const uint2*>(&kQuartersOfTime.at[quarter_of(__uint2float_rz(x))]));
    return static_cast<int>(quarter.y) + (x >= quarter.x ? 1 : 0);
}
__device__ __forceinline__ int bucket_of(uint64_t x) {
    const uint4 quarter = __ldg(reinterpret_cast<const uint4*>(&kQuartersOfTime.at[quarter_of(__ull2float_rz(x))]));
    return static_cast<int>(quarter.y) + (x >= (uint64_t{quarter.z} << 32 | quarter.x) ? 1 : 0);
}

}  // namespace hstu::attention
