// The gated layer norm on a GPU: shapes of a call, and its two directions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/execution.h"
#include "common/tensor.h"

namespace hstu::norm {

// Rows of `heads` parts, each of `width` elements of which the first `dim` count.
struct Parts {
    void* data;
    int64_t row_stride, head_stride;
};
struct Rows {
    void* data;  // null for none
    int64_t stride;
};

struct Params {
    int64_t rows;
    int heads, dim, width;
    float eps;
    Parts x, dx;        // [rows, heads, width]
    Rows gate, out;     // [rows, heads * dim], of the output's type
    Rows dout, dgate;   // the same
    float* statistics;  // [rows, 2]: mean and 1 / sqrt(variance + eps)
};

// x [rows, heads, width], gate (or None) and out [rows, heads * dim], statistics float32 [rows, 2].
void forward(const Tensor& x, const Tensor& gate, const Tensor& out, const Tensor& statistics, double eps,
             Execution execution);

// Writes dx, 0 in the columns that do not count, and where there is a gate dgate.
void backward(const Tensor& dout, const Tensor& x, const Tensor& gate, const Tensor& statistics, const Tensor& dx,
              const Tensor& dgate, Execution execution);

// In cuda.cu. `stream` is a cudaStream_t.
void launch_forward(const Params& p, DType x_type, DType out_type, int device, void* stream);
void launch_backward(const Params& p, DType x_type, DType out_type, int device, void* stream);

}  // namespace hstu::norm
