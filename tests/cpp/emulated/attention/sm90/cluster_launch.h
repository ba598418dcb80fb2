// In the place of csrc/attention/sm90/cluster_launch.h.
#pragma once

#include "common/cuda_launch.h"

namespace hstu::attention::sm90 {

struct ClusterLaunch {
    int cluster;
    bool together;
    int threads, shared_bytes, device;
    cudaStream_t stream;

    template <auto kKernel>
    int fitting() {
        return emulated::multiprocessor_count;
    }
    template <auto kKernel, class... Args>
    void run(int clusters, const Args&... args) {
        if (shared_bytes > emulated::kSharedBytes) emulated::fail("too much shared memory");
        if (clusters > 0)
            emulated::run_grid(static_cast<unsigned>(clusters * cluster), threads, [&] { kKernel(args...); }, cluster);
    }
};

}  // namespace hstu::attention::sm90
