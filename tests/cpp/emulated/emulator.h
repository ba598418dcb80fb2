// Runs the code of a GPU kernel on a CPU, one block after another: every thread is a fiber, and the headers beside this one
// stand in for those that hold PTX (they come first on the include path). Asynchronous copies and products happen as early
// or as late as their definition allows, by `late` and a random order, so that a missing wait shows in the results and a
// wrong barrier as a deadlock. What it cannot show is what the hardware makes of descriptors, swizzles and instructions.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../device_functions.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __align__(n)
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace hstu::attention::sm90 {
alignas(1024) unsigned char shared_memory[232448];  // what a kernel declares as `extern __shared__`
}

namespace emulated {

constexpr int kSharedBytes = sizeof hstu::attention::sm90::shared_memory;
inline unsigned char* const shared_window = hstu::attention::sm90::shared_memory;

// One mbarrier.
struct BarrierState {
    int arrivals, pending, bytes = 0;
    uint32_t phase = 0;

    void settle() {
        if (pending == 0 && bytes == 0) pending = arrivals, phase ^= 1;
    }
};

struct NamedBarrier {
    int arrived = 0, round = 0;
};

struct Warp {
    int arrived = 0, generation = 0, alive = 32;
    uint64_t values[32];
    const uint32_t* pointers[32];

    void arrive() {
        if (++arrived == alive) arrived = 0, ++generation;
    }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;
    const char* waits_for = "";
    int thread = 0;
    bool done = false;
    std::vector<std::vector<std::function<void()>>> product_groups;  // committed, oldest first
    std::vector<std::function<void()>> products;                     // not committed
    int copies_out = 0;                                              // begun, not finished
};

struct Block {
    dim3 index, grid, size;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::map<uint32_t, BarrierState> barriers;
    std::map<int, NamedBarrier> named;
    NamedBarrier everyone;
    std::vector<std::function<void()>> copies;  // asynchronous copies under way
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::function<void()> body;
    std::vector<unsigned char> memory;  // its shared memory while another block runs
    std::vector<Block*> cluster;
    NamedBarrier whole_cluster;  // of a cluster's first block
    int left;                    // threads that have not ended
};

inline Block* block = nullptr;
inline std::mt19937 random_numbers;
inline bool late = false;
inline int multiprocessor_count = 3;

[[noreturn]] inline void fail(const std::string& text) {
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}

// Another block of the cluster, or this one, and its shared memory.
inline Block& neighbour(int rank) {
    Block& other = *block->cluster.at(static_cast<size_t>(rank));
    if (other.left == 0) fail("a block of the cluster has ended");
    return other;
}
inline unsigned char* memory_of(Block& b) { return &b == block ? shared_window : b.memory.data(); }

inline Fiber& fiber() { return *block->current; }
inline Warp& warp() { return block->warps[fiber().thread / 32]; }

inline void wait_until(const char* what, std::function<bool()> ready) {
    if (ready()) return;
    Fiber& self = fiber();
    self.ready = std::move(ready);
    self.waits_for = what;
    swapcontext(&self.context, &block->scheduler);
}

inline void sync_warp() {
    Warp& w = warp();
    const int generation = w.generation;
    w.arrive();
    wait_until("warp", [&w, generation] { return w.generation != generation; });
}

template <class T, class Use>
auto exchange(T value, Use&& use) {
    static_assert(sizeof(T) <= 8);
    Warp& w = warp();
    std::memcpy(&w.values[fiber().thread % 32], &value, sizeof(T));
    sync_warp();
    const auto result = use([&w](int lane) {
        T other;
        std::memcpy(&other, &w.values[lane & 31], sizeof(T));
        return other;
    });
    sync_warp();
    return result;
}

inline void start_fiber() {
    block->body();
    Fiber& self = fiber();
    if (!self.product_groups.empty() || !self.products.empty()) fail("a thread ended with products under way");
    self.done = true;
    Warp& w = warp();
    --w.alive;
    if (w.alive > 0 && w.arrived == w.alive) w.arrived = 0, ++w.generation;
    swapcontext(&self.context, &block->scheduler);
}

inline void run_random_copy() {
    const size_t i = random_numbers() % block->copies.size();
    const auto copy = std::move(block->copies[i]);
    block->copies.erase(block->copies.begin() + static_cast<long>(i));
    copy();
}

inline std::unique_ptr<Block> start_block(dim3 index, dim3 grid, int threads, std::function<void()> body) {
    auto b = std::make_unique<Block>();
    b->index = index, b->grid = grid, b->size = {static_cast<unsigned>(threads), 1, 1};
    b->body = std::move(body);
    b->warps.resize(threads / 32);
    b->memory.assign(kSharedBytes, 0xff);  // NaN
    b->left = threads;
    constexpr size_t kStack = 128 << 10;
    for (int t = 0; t < threads; ++t) {
        auto f = std::make_unique<Fiber>();
        f->thread = t;
        f->stack.reset(new char[kStack]);
        getcontext(&f->context);
        f->context.uc_stack.ss_sp = f->stack.get();
        f->context.uc_stack.ss_size = kStack;
        f->context.uc_link = &b->scheduler;
        makecontext(&f->context, start_fiber, 0);
        b->fibers.push_back(std::move(f));
    }
    return b;
}

// Runs a block until it has ended or nothing in it can go on; false where nothing could.
inline bool advance(Block& b) {
    block = &b;
    std::memcpy(shared_window, b.memory.data(), kSharedBytes);
    const int threads = static_cast<int>(b.fibers.size()), warps = threads / 32;
    bool ever = false;
    for (bool progress = true; progress && b.left > 0; ever |= progress) {
        progress = false;
        const int first = static_cast<int>(random_numbers() % warps);
        for (int i = 0; i < threads; ++i) {
            Fiber& f = *b.fibers[(first * 32 + i) % threads];
            if (f.done || (f.ready && !f.ready())) continue;
            f.ready = nullptr;
            progress = true;
            b.current = &f;
            swapcontext(&b.scheduler, &f.context);
            b.left -= f.done;
        }
        while (!b.copies.empty() && (!progress || (!late && random_numbers() % 4 != 0))) {
            run_random_copy();
            progress = true;
        }
    }
    if (b.left == 0)
        while (!b.copies.empty()) run_random_copy();
    std::memcpy(b.memory.data(), shared_window, kSharedBytes);
    block = nullptr;
    return ever;
}

// All blocks of a grid, side by side: they may wait for one another.
inline void run_grid(unsigned blocks, int threads, const std::function<void()>& body, unsigned cluster = 1) {
    std::vector<std::unique_ptr<Block>> grid;
    for (unsigned i = 0; i < blocks; ++i) grid.push_back(start_block({i, 1, 1}, {blocks, 1, 1}, threads, body));
    for (unsigned i = 0; i < blocks; ++i)
        for (unsigned j = 0; j < cluster; ++j) grid[i]->cluster.push_back(grid[i / cluster * cluster + j].get());
    for (bool running = true; running;) {
        running = false;
        bool progress = false;
        const unsigned first = random_numbers() % blocks;
        for (unsigned i = 0; i < blocks; ++i) {
            Block& b = *grid[(first + i) % blocks];
            if (b.left > 0) progress |= advance(b);
            running |= b.left > 0;
        }
        if (progress || !running) continue;
        std::string text = "deadlock:";
        for (const auto& b : grid)
            for (size_t w = 0; w < b->warps.size(); ++w)
                if (const Fiber& f = *b->fibers[w * 32]; !f.done)
                    text += " block " + std::to_string(b->index.x) + " warp " + std::to_string(w) + " waits for " +
                            f.waits_for + ";";
        fail(text);
    }
}

struct ThreadIndex {
    struct Value {
        operator int() const { return fiber().thread; }
    } x;
};
struct BlockIndex {
    struct Value {
        operator int() const { return static_cast<int>(block->index.x); }
    } x;
};
struct GridSize {
    struct Value {
        operator int() const { return static_cast<int>(block->grid.x); }
    } x;
};
struct BlockSize {
    struct Value {
        operator int() const { return static_cast<int>(block->size.x); }
    } x;
};

}  // namespace emulated

inline emulated::ThreadIndex threadIdx;
inline emulated::BlockIndex blockIdx;
inline emulated::GridSize gridDim;
inline emulated::BlockSize blockDim;

inline void __syncwarp() { emulated::sync_warp(); }
inline void __syncthreads() {
    emulated::NamedBarrier& b = emulated::block->everyone;
    const int round = b.round;
    if (++b.arrived == static_cast<int>(emulated::block->fibers.size())) b.arrived = 0, ++b.round;
    emulated::wait_until("__syncthreads", [&b, round] { return b.round != round; });
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulated::exchange(value, [=](const auto& of) { return of(lane); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int self = threadIdx.x % 32;
    return emulated::exchange(value, [=](const auto& of) { return of(self ^ mask); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
    const int self = threadIdx.x % 32;
    return emulated::exchange(value, [=](const auto& of) { return of(self >= delta ? self - delta : self); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
    return emulated::exchange(value, [](const auto& of) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(of(i)) << i;
        return bits;
    });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline unsigned __match_any_sync(unsigned, int value) {
    return emulated::exchange(value, [=](const auto& of) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(of(i) == value) << i;
        return bits;
    });
}
inline int __reduce_min_sync(unsigned, int value) {
    return emulated::exchange(value, [](const auto& of) {
        int least = of(0);
        for (int i = 1; i < 32; ++i) least = std::min<int>(least, of(i));
        return least;
    });
}
inline int __reduce_max_sync(unsigned mask, int value) { return -__reduce_min_sync(mask, -value); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
void __stcg(T* to, T value) {
    *to = value;
}

inline float __log2f(float x) { return std::log2(x); }
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}
