// The pairs (t, j) of a sampled softmax, sorted by item: a radix sort of 4-byte items with 4-byte places over as many
// bits as items have. It is stable, so that an item's pairs stay in ascending order.
#include <cub/device/device_radix_sort.cuh>

#include "common/cuda_launch.h"
#include "similarity/sm80/sampled_softmax.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    sampled_items_kernel(const SampledParams p, uint32_t* items, uint32_t* order) {
    const int64_t count = p.samples + 1, place = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (place >= p.rows * count) return;
    items[place] = static_cast<uint32_t>(p.inside(p.item(place / count, place % count)));
    order[place] = static_cast<uint32_t>(place);
}

int bits_of(int64_t items) {
    int bits = 1;
    while (bits < 32 && items > int64_t{1} << bits) ++bits;
    return bits;
}

cudaError_t sort(void* scratch, size_t& bytes, const SampledSort& s, int64_t pairs, int64_t items, cudaStream_t stream,
                 int& half) {
    cub::DoubleBuffer<uint32_t> keys(s.items[0], s.items[1]), values(s.order[0], s.order[1]);
    const cudaError_t status = cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, values, static_cast<int>(pairs), 0,
                                                               bits_of(items), stream);
    half = keys.selector;
    return status;
}

}  // namespace

size_t sampled_softmax_sort_bytes(int64_t pairs, int64_t items) {
    size_t bytes = 0;
    int half = 0;
    check_cuda(sort(nullptr, bytes, {}, pairs, items, nullptr, half), "planning a sort");
    return bytes;
}

int sampled_softmax_sort(const SampledParams& p, const SampledSort& s, int device, void* stream_handle) {
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int64_t pairs = p.rows * (p.samples + 1);
    launch<&sampled_items_kernel>(ceil_div<int64_t>(pairs, kThreads), kThreads, 0, device, stream, p, s.items[0],
                                  s.order[0]);
    size_t bytes = s.scratch_bytes;
    int half = 0;
    if (pairs > 0) check_cuda(sort(s.scratch, bytes, s, pairs, p.items, stream, half), "a sort");
    return half;
}

}  // namespace hstu::similarity::sm80
