// What an attention kernel is told. Plain data, filled once by api.cpp, read by CPU, SM80 and SM90.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/index_array.h"

namespace hstu::attention {

// A packed [rows, heads, dim] tensor; the last dimension is contiguous. Strides are in elements.
struct Jagged {
    void* data = nullptr;
    int64_t row_stride = 0;
    int64_t head_stride = 0;

    template <class T>
    HSTU_HOST_DEVICE T* at(int64_t row, int head) const {
        return static_cast<T*>(data) + row * row_stride + head * head_stride;
    }
};

// A dense [batch, heads or 1, M, M] tensor; a broadcast head has head_stride 0.
struct Dense {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;  // the last dimension is contiguous
    int64_t size = 0;        // M

    template <class T>
    HSTU_HOST_DEVICE T* at(int64_t batch, int head, int64_t row) const {
        return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
    }
};

// The relative bias by position and by time. Tables are fp32, on the CPU fp64 in fp64; either may be absent, and a table
// for all heads has head stride 0.
struct Relative {
    const void* position = nullptr;  // [2 * reach + 1] for distances -reach to reach
    int reach = 0;
    int64_t position_head_stride = 0;
    const void* time = nullptr;  // [num_buckets + 1]
    int num_buckets = 0;
    int64_t time_head_stride = 0;
    const int64_t* query_times = nullptr;  // [total_q]
    const int64_t* key_times = nullptr;    // [total_k]

    HSTU_HOST_DEVICE explicit operator bool() const { return position != nullptr || time != nullptr; }
};

struct Params {
    int batch = 0, heads = 0;
    int dim_qk = 0, dim_v = 0;         // 8..256, multiples of 8
    int64_t total_q = 0, total_k = 0;  // packed rows
    int max_seqlen_q = 0, max_seqlen_k = 0;

    float alpha = 1.0f;        // S = alpha * (q.k + rab)
    float inv_scaling = 1.0f;  // 1 / N, N = scaling_seqlen
    double alpha_fp64 = 1.0;   // the same two for the CPU kernels, which also run in fp64
    double inv_scaling_fp64 = 1.0;

    Jagged q, k, v;  // [total_q, heads, dim_qk] [total_k, heads, dim_qk] [total_k, heads, dim_v]
    Jagged out;      // [total_q, heads, dim_v]; every element is written

    IndexArray cu_seqlens_q, cu_seqlens_k;  // [batch + 1]
    IndexArray seqused_q, seqused_k;        // [batch], may be absent
    IndexArray num_contexts, num_targets;   // [batch], may be absent
    int target_group_size = 1;
    int window_left = -1, window_right = -1;  // -1: unbounded

    const int32_t* func = nullptr;  // [heads or 1, func_count, >= total_q], may be nullptr
    int func_count = 0;             // odd
    int64_t func_head_stride = 0, func_stride = 0;

    Dense rab;  // dtype of q; data may be nullptr
    Relative relative;

    int device = -1;      // -1: CPU
    int num_threads = 1;  // CPU only
};

constexpr int kExactWords = 10;                // 64-bit words of an exact sum in fp32 (exact_sum.h)
constexpr int kTableCopies = 2 * kExactWords;  // copies of the tables' gradients in as much memory

struct BackwardParams : Params {
    Jagged dout;                // [total_q, heads, dim_v]
    Jagged dq, dk, dv;          // as q, k, v; every element is written
    Dense drab;                 // [batch, heads, M, M], dtype of q, zeroed by the caller; data may be nullptr
    void* dposition = nullptr;  // as relative.position and .time, zeroed by the caller; may be nullptr
    void* dtime = nullptr;
    int64_t dposition_head_stride = 0, dtime_head_stride = 0;
    // On a GPU, zeroed: where deterministic the exact sums of both, kExactWords an entry, else kTableCopies of both in fp32.
    int64_t* table_accum = nullptr;
    float* dq_accum = nullptr;  // fp32 scratch of dq_accum_elements(); nullptr: dQ by its own pass
    bool deterministic = false;
};

// The rows that one sequence owns. Whatever the offsets hold, the ranges stay inside the tensors.
struct Sequence {
    int64_t q_begin, k_begin;  // first packed row
    int alloc_q, alloc_k;      // rows between the offsets
    int len_q, len_k;          // rows in use: min(alloc, max_seqlen, seqused)

    HSTU_HOST_DEVICE Sequence(const Params& p, int b) {
        load(p.cu_seqlens_q, p.seqused_q, b, p.total_q, p.max_seqlen_q, q_begin, alloc_q, len_q);
        load(p.cu_seqlens_k, p.seqused_k, b, p.total_k, p.max_seqlen_k, k_begin, alloc_k, len_k);
    }

  private:
    HSTU_HOST_DEVICE static void load(const IndexArray& offsets, const IndexArray& used, int b, int64_t total,
                                      int max_len, int64_t& begin, int& alloc, int& len) {
        constexpr int64_t kLongest = 0x7fffffff;
        begin = clamp_to<int64_t>(offsets[b], 0, total);
        alloc = static_cast<int>(min_of(clamp_to<int64_t>(offsets[b + 1], begin, total) - begin, kLongest));
        len = min_of(alloc, max_len);
        if (used) len = static_cast<int>(clamp_to<int64_t>(used[b], 0, len));
    }
};

}  // namespace hstu::attention
