// Stands in for csrc/attention/gpu.h and CUDA's own names: a warp on the host, for warp-level code that holds no machine
// instructions. The 32 lanes are coroutines that take turns; a shuffle hands the turn on until every lane has come to it.
// That all lanes come to the same shuffles, as kernels promise, is checked.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../device_functions.h"

#define __device__
#define __host__
#define __forceinline__ inline

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

namespace warp_on_host {

constexpr int kLanes = 32;

struct Warp {
    ucontext_t scheduler;
    ucontext_t lanes[kLanes];
    int lane = 0;
    bool finished[kLanes];
    uint64_t slots[kLanes];
    std::function<void()> body;
};
inline Warp warp;

inline void next() { swapcontext(&warp.lanes[warp.lane], &warp.scheduler); }

inline void lane_main() {
    warp.body();
    warp.finished[warp.lane] = true;
}

// Runs body() in every lane of one warp.
inline void run(std::function<void()> body) {
    static std::vector<char> stacks(kLanes << 18);
    warp.body = std::move(body);
    for (int l = 0; l < kLanes; ++l) {
        warp.finished[l] = false;
        getcontext(&warp.lanes[l]);
        warp.lanes[l].uc_stack.ss_sp = stacks.data() + (l << 18);
        warp.lanes[l].uc_stack.ss_size = 1 << 18;
        warp.lanes[l].uc_link = &warp.scheduler;
        makecontext(&warp.lanes[l], lane_main, 0);
    }
    for (int done = 0; done < kLanes;) {
        done = 0;
        for (int l = 0; l < kLanes; ++l) {
            warp.lane = l;
            swapcontext(&warp.scheduler, &warp.lanes[l]);
            done += warp.finished[l];
        }
        if (done != 0 && done != kLanes) {
            std::printf("%d lanes are done and the others wait for them\n", done);
            std::exit(1);
        }
    }
}

template <class T>
T exchange(T value, const std::function<T(const T*)>& choose) {
    static T all[kLanes];
    all[warp.lane] = value;
    next();
    const T chosen = choose(all);
    next();
    return chosen;
}

}  // namespace warp_on_host

template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return warp_on_host::exchange<T>(value, [=](const T* all) { return all[source & 31]; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return warp_on_host::exchange<T>(value, [=](const T* all) { return all[warp_on_host::warp.lane ^ mask]; });
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    return warp_on_host::exchange<unsigned>(value, [](const unsigned* all) {
        unsigned any = 0;
        for (int l = 0; l < warp_on_host::kLanes; ++l) any |= all[l];
        return any;
    });
}

template <class T, class U>
void atomicAdd(T* to, U value) {
    *to += static_cast<T>(value);
}
inline int __ffs(int x) { return __builtin_ffs(x); }

inline void __syncwarp() { warp_on_host::next(); }

#include "attention/shared_tile.h"

namespace hstu::attention {
inline int lane() { return warp_on_host::warp.lane; }

inline float shared_memory[1 << 14];
inline float load_shared(uint32_t from) { return shared_memory[from / 4]; }
inline float4 load_shared4(uint32_t from) {
    const float* x = shared_memory + from / 4;
    return {x[0], x[1], x[2], x[3]};
}
inline void store_shared(uint32_t to, float x) { shared_memory[to / 4] = x; }
}  // namespace hstu::attention
