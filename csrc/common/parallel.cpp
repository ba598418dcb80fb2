#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace hstu {
namespace {

struct Loop {
    int64_t count;
    const std::function<void(int64_t, int)>* body;
    std::atomic<int64_t> next_item{0};
    std::atomic<int> next_worker{0};

    void work() {
        const int worker = next_worker.fetch_add(1);
        for (int64_t item; (item = next_item.fetch_add(1)) < count;) (*body)(item, worker);
    }
};

// The entry points of whichever OpenMP runtime is loaded globally; libgomp and libomp export both. Nothing is linked,
// because the runtime must be the one that torch brings.
struct OpenMp {
    void (*parallel)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
    int (*in_parallel)() = nullptr;

    OpenMp() {
#if defined(__unix__) || defined(__APPLE__)
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
#endif
    }
    explicit operator bool() const { return parallel != nullptr && in_parallel != nullptr; }
};

thread_local bool in_own_threads = false;

void run_on_own_threads(Loop& loop, int num_threads) {
    const auto work = [&loop] {
        in_own_threads = true;
        loop.work();
        in_own_threads = false;
    };
    std::vector<std::thread> threads;
    threads.reserve(num_threads - 1);
    try {
        for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {
        // The system has no more threads to give: those that started, and this one, do all of the items.
    }
    work();
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& body) {
    static const OpenMp openmp;
    Loop loop{count, &body};
    if (num_threads <= 1 || count <= 1 || in_own_threads || (openmp && openmp.in_parallel())) return loop.work();
    if (!openmp) return run_on_own_threads(loop, static_cast<int>(std::min<int64_t>(num_threads, count)));
    openmp.parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, static_cast<unsigned>(num_threads), 0);
}

}  // namespace hstu
