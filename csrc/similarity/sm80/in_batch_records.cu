// Records of queries and items (in_batch_records.h).
//
// One warp: one row, whose norm it sums up. Its first lane numbers the id and its second the sequence, by a hash table
// with linear probing that all warps fill at once: a value's number is the slot where it lies. Which slot that is may
// differ between runs; which values have one number does not.
#include "similarity/sm80/in_batch_records.h"

#include "common/cuda_launch.h"
#include "similarity/sm80/rows.h"

namespace hstu::similarity::sm80 {
namespace {

constexpr int kThreads = 256;

// 0 marks a free slot, so the value 0 has a number of its own, behind the last slot.
__device__ __forceinline__ int number_of(const InBatchRecords& p, int64_t value) {
    const auto key = static_cast<unsigned long long>(value);
    if (key == 0) return static_cast<int>(p.slot_count);
    unsigned long long mixed = key * 0x9e3779b97f4a7c15ull;
    mixed = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93ull;
    for (auto slot = static_cast<uint32_t>(mixed >> 32);; ++slot) {
        slot &= p.slot_count - 1;
        unsigned long long found = *static_cast<volatile unsigned long long*>(p.slots + slot);
        if (found == 0) found = atomicCAS(p.slots + slot, 0ull, key);
        if (found == 0 || found == key) return static_cast<int>(slot);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) in_batch_records_kernel(const __grid_constant__ InBatchRecords p) {
    const int64_t row = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= p.queries + p.items) return;
    const bool is_query = row < p.queries;
    const int64_t r = is_query ? row : row - p.queries;
    const T* const from = row_of<const T>(is_query ? p.query : p.item, r);
    float square = 0;
    for (int64_t d = lane; d < p.dim; d += 32) {
        const float x = to_float(from[d]);
        square += x * x;
    }
    const float inverse = Norm(sum_over<32>(square), p.inverse_eps).inverse;

    const int64_t place = is_query ? clamp_to<int64_t>(p.positives[r], 0, p.items - 1) : r;
    int number = is_query ? -1 : -2;
    if (lane == 0) number = number_of(p, p.item_ids[place]);
    if (lane == 1 && p.query_sequences) number = number_of(p, is_query ? p.query_sequences[r] : p.item_sequences[r]);
    const int sequence = __shfl_sync(kAllLanes, number, 1);
    if (lane > 0) return;
    if (is_query)
        p.query_records[r] = {number, sequence, static_cast<int>(place), inverse * p.inverse_temperature};
    else
        p.item_records[r] = {number, sequence, p.log_q ? p.log_q[r] : 0.0f, inverse};
}

}  // namespace

void in_batch_records(const InBatchRecords& p, DType dtype, int device, void* stream) {
    with_element_type(dtype, [&](auto zero) {
        launch<in_batch_records_kernel<decltype(zero)>>(ceil_div<int64_t>(p.queries + p.items, kThreads / 32), kThreads,
                                                        0, device, static_cast<cudaStream_t>(stream), p);
    });
}

}  // namespace hstu::similarity::sm80
