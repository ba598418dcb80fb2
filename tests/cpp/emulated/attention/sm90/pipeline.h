// In the place of csrc/attention/sm90/pipeline.h.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace hstu::attention::sm90 {

constexpr int kWarpgroup = 128;

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::shared_window);
}

struct Barrier {
    uint32_t address;

    emulated::BarrierState& state(emulated::Block& block = *emulated::block) const {
        const auto found = block.barriers.find(address);
        if (found == block.barriers.end() || address % 8 != 0) emulated::fail("a barrier without init");
        return found->second;
    }
    void init(int arrivals) const { emulated::block->barriers[address] = {arrivals, arrivals}; }
    void arrive() const { arrive(state()); }
    void arrive_at(int rank) const { arrive(state(emulated::neighbour(rank))); }
    static void arrive(emulated::BarrierState& b) {
        if (b.pending == 0) emulated::fail("too many arrivals at a barrier");
        --b.pending;
        b.settle();
    }
    void arrive_expecting(int bytes) const {
        state().bytes += bytes;
        arrive();
    }
    void complete(int bytes, emulated::Block& block = *emulated::block) const {
        state(block).bytes -= bytes;
        state(block).settle();
    }
    void wait(uint32_t parity) const {
        emulated::BarrierState& b = state();
        emulated::wait_until("an mbarrier", [&b, parity] { return b.phase != (parity & 1); });
    }
};

template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;

    void next() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

inline void fence_barrier_init() {}
inline void fence_async() {}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline void sync_cluster() {
    emulated::NamedBarrier& b = emulated::neighbour(0).whole_cluster;
    const int round = b.round;
    if (++b.arrived == static_cast<int>(emulated::block->fibers.size() * emulated::block->cluster.size()))
        b.arrived = 0, ++b.round;
    emulated::wait_until("the cluster", [&b, round] { return b.round != round; });
}
inline void copy_to_block(int rank, uint32_t to, uint32_t from, int bytes, Barrier barrier) {
    if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) emulated::fail("a copy that is not aligned");
    emulated::block->copies.push_back([=] {
        emulated::Block& other = emulated::neighbour(rank);
        std::memcpy(emulated::memory_of(other) + to, emulated::shared_window + from, static_cast<size_t>(bytes));
        barrier.complete(bytes, other);
    });
}

inline void named_sync(int number, int threads) {
    emulated::NamedBarrier& b = emulated::block->named[number];
    const int round = b.round;
    if (++b.arrived == threads) b.arrived = 0, ++b.round;
    emulated::wait_until("a named barrier", [&b, round] { return b.round != round; });
}

template <int kCount>
void raise_registers() {}
template <int kCount>
void lower_registers() {}
inline bool elected() { return threadIdx.x % 32 == 0; }
inline int uniform_warp() { return threadIdx.x / 32; }

inline void await_counter(const int* counter, int least) {
    emulated::wait_until("a counter", [=] { return *counter >= least; });
}
inline void raise_counter(int* counter) { ++*counter; }
inline void add_to_global(float* to, float x) { *to += x; }
inline void add_to_global(float4* to, float4 x) { to->x += x.x, to->y += x.y, to->z += x.z, to->w += x.w; }

}  // namespace hstu::attention::sm90
