// Launching clusters of blocks, and blocks that wait for one another.
#pragma once

#include "common/cuda_launch.h"

namespace hstu::attention::sm90 {

// A launch of clusters of blocks. Together: for blocks that wait for one another, they start together or, while other
// kernels hold the GPU, not at all.
struct ClusterLaunch {
    int cluster;  // blocks of one
    bool together;
    int threads, shared_bytes, device;
    cudaStream_t stream;
    cudaLaunchConfig_t config_ = {};
    cudaLaunchAttribute attributes_[2] = {};

    // Valid until the next call and while this lives.
    const cudaLaunchConfig_t& config(int blocks) {
        config_ = {};
        config_.gridDim = dim3(static_cast<unsigned>(blocks));
        config_.blockDim = dim3(static_cast<unsigned>(threads));
        config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
        config_.stream = stream;
        config_.attrs = attributes_;
        if (cluster > 1) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes_[config_.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        }
        if (together) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
            attributes_[config_.numAttrs++].val.cooperative = 1;
        }
        return config_;
    }
    // Clusters that fit the GPU at a time, if a multiprocessor has room for one block.
    template <auto kKernel>
    int fitting() {
        if (cluster == 1) return multiprocessors(device);
        reserve_shared<kKernel>(shared_bytes, device);
        static std::array<std::atomic<int>, 64> known{};
        std::atomic<int>& count = known[device % known.size()];
        if (count.load(std::memory_order_relaxed) == 0) {
            int found = 0;
            check_cuda(
                cudaOccupancyMaxActiveClusters(&found, kKernel, &config(multiprocessors(device) / cluster * cluster)),
                "asking how many clusters fit");
            count.store(std::max(1, found), std::memory_order_relaxed);
        }
        return count.load(std::memory_order_relaxed);
    }
    template <auto kKernel, class... Args>
    void run(int clusters, const Args&... args) {
        if (clusters == 0) return;
        reserve_shared<kKernel>(shared_bytes, device);
        check_cuda(cudaLaunchKernelEx(&config(clusters * cluster), kKernel, args...), "a kernel launch");
    }
};

}  // namespace hstu::attention::sm90
