// What the kernels of every GPU family share: element types, the layout of tiles in shared memory, rows and tiles of a
// sequence.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "attention/mask.h"
#include "attention/shared_tile.h"
#include "attention/tile_walk.h"

namespace hstu::attention {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x >> 5; }
// The lane, unknown to be the same as before: what is computed from it in a loop stays there instead of taking registers
// outside of it.
__device__ __forceinline__ int lane_anew() {
    int x = lane();
    asm volatile("" : "+r"(x));
    return x;
}

// At an address in the shared window.
__device__ __forceinline__ float load_shared(uint32_t from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}
__device__ __forceinline__ float4 load_shared4(uint32_t from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

// Blocks along a sequence; at least one, which clears the rows that nobody uses.
__host__ __device__ __forceinline__ int block_count(int max_seqlen, int rows) {
    return max_of(1, ceil_div(max_seqlen, rows));
}

// Threads of a block that share a loop: all of them, unless said otherwise.
struct Team {
    int thread, threads;

    __device__ __forceinline__ Team() : thread(threadIdx.x), threads(blockDim.x) {}
    __device__ __forceinline__ Team(int thread, int threads) : thread(thread), threads(threads) {}
};

// Writes 0 to rows [begin, end) of one head.
template <class T>
__device__ __forceinline__ void zero_rows(const Jagged& out, int head, int64_t begin, int64_t end, int num_cols,
                                          Team team = {}) {
    const int chunks = num_cols / 8;
    for (int64_t i = team.thread; i < (end - begin) * chunks; i += team.threads)
        *reinterpret_cast<uint4*>(out.at<T>(begin + i / chunks, head) + i % chunks * 8) = uint4{0, 0, 0, 0};
}

// Rows of a [total, heads, dim] result that belong to no used row, cleared by the block that owns rows
// [row0, row0 + rows) of sequence b: its own tail past `len`, past the last block, and before or after all sequences.
template <class T>
__device__ __forceinline__ void zero_unused_rows(const Jagged& out, int head, int num_cols, int b, int batch,
                                                 int64_t total, int64_t begin, int alloc, int len, int row0, int rows,
                                                 bool last_block, Team team = {}) {
    const int64_t owned_end = last_block ? alloc : min_of(row0 + rows, alloc);
    if (owned_end > max_of(row0, len))
        zero_rows<T>(out, head, begin + max_of(row0, len), begin + owned_end, num_cols, team);
    if (b == 0 && row0 == 0 && begin > 0) zero_rows<T>(out, head, 0, begin, num_cols, team);
    if (b == batch - 1 && row0 == 0 && begin + alloc < total)
        zero_rows<T>(out, head, begin + alloc, total, num_cols, team);
}

}  // namespace hstu::attention
