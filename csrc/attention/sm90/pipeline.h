// Who waits on whom on Hopper: mbarriers, rings of stages, named barriers, fences, registers handed between warpgroups.
//
// A ring has a `full` and an `empty` barrier a stage. The producer waits for empty, starts a copy that reports its bytes
// to full; consumers wait for full, read, and arrive at empty. Phases alternate, so a side only keeps (stage, phase).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace hstu::attention::sm90 {

constexpr int kWarpgroup = 128;  // threads

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t address_at(uint32_t address, int rank) {
    uint32_t result;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
    return result;
}

// An mbarrier: 8 bytes of shared memory.
struct Barrier {
    uint32_t address;

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals));
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
    }
    // The same at the barrier of another block of the cluster, by a thread that has read and not written: a release at
    // cluster scope would first wait for every store and reduction of the thread to reach the L2 cache.
    __device__ __forceinline__ void arrive_at(int rank) const {
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at(address, rank)) : "memory");
    }
    // One arrival that also announces `bytes` that asynchronous copies will report here.
    __device__ __forceinline__ void arrive_expecting(int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    }
    // Returns when the phase of this parity is over. A fresh barrier is in phase 0; the phase before it counts as over.
    __device__ __forceinline__ void wait(uint32_t parity) const {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(address),
            "r"(parity)
            : "memory");
    }
};

// The next stage of a ring of kStages and the parity of its phase. The consumer waits for full with phase, the producer
// for empty with phase ^ 1.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void next() {
        if (kStages == 1 || ++stage == kStages) stage = 0, phase ^= 1;
    }
};

// After mbarrier.init, before other threads or asynchronous copies use the barriers (with a __syncthreads).
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before later reads by TMA or wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Starts the copy of `bytes` of shared memory to the place `to` of another block of the cluster, whose `barrier` gets the
// bytes. Both are this block's addresses. After fence_async() by the writers.
__device__ __forceinline__ void copy_to_block(int rank, uint32_t to, uint32_t from, int bytes, Barrier barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address_at(to, rank)),
                 "r"(from), "r"(bytes), "r"(address_at(barrier.address, rank))
                 : "memory");
}

// Named barriers 1 to 15; number 0 is __syncthreads. `threads` counts every thread that syncs.
__device__ __forceinline__ void named_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers a thread of this warpgroup may use from here on (a multiple of 8); all its warps must call it.
template <int kCount>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// True in one lane of a converged warp.
__device__ __forceinline__ bool elected() {
    uint32_t chosen;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(chosen));
    return chosen != 0;
}

// The warp's number within the block, known to be the same in all its lanes.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32), 0); }

// ---- Between blocks ----

// For kernels of launch_early(). Blocks of the next kernel may take the place of blocks that end from here on.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Returns once the kernel before is over and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Returns once a counter has been raised `least` times; what its writers wrote before is then visible.
__device__ __forceinline__ void await_counter(const int* counter, int least) {
    int raised;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(counter) : "memory");
    } while (raised < least);
}
// Counts one more, after all writes to global memory that this thread knows of.
__device__ __forceinline__ void raise_counter(int* counter) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// Adds to global memory, without waiting for what was there.
__device__ __forceinline__ void add_to_global(float* to, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void add_to_global(float4* to, float4 x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}

}  // namespace hstu::attention::sm90
