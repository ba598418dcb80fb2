// Every check of the gated layer norm, and the call of its kernel.
#include "norm/norm.h"

#include <cmath>

#include "common/check.h"

#if HSTU_EXT_CUDA
#include "common/cuda.h"
#endif

#define CHECK(condition, ...) HSTU_CHECK(condition, "hstu_ext.gated_norm: ", __VA_ARGS__)

namespace hstu::norm {
namespace {

void check_type(const char* name, const Tensor& x) {
    CHECK(x, name, " must be a tensor, got None");
    CHECK(x.dtype == DType::kFloat32 || x.dtype == DType::kFloat16 || x.dtype == DType::kBFloat16, name,
          " must be torch.float32, torch.float16 or torch.bfloat16 on a GPU, got ", x.dtype);
}

void check_device(const char* name, const Tensor& x, const Tensor& model) {
    CHECK(x.device == model.device, name, " must be on ", Device{model.device}, " like x, got ", Device{x.device});
}

int64_t stride_of(const Tensor& x, int dimension) { return x.shape[dimension] > 1 ? x.stride[dimension] : 0; }

Parts parts(const char* name, const Tensor& x, const Tensor& model) {
    check_type(name, x);
    check_device(name, x, model);
    CHECK(x.dtype == model.dtype, name, " must be ", model.dtype, " like x, got ", x.dtype);
    CHECK(x.rank == 3 && x.shape[1] >= 1 && x.shape[2] >= 1 && x.shape[1] * x.shape[2] < (int64_t{1} << 31), name,
          " must be [rows, heads, width], got ", Shape{x});
    CHECK(x.shape[0] == model.shape[0] && x.shape[1] == model.shape[1] && x.shape[2] == model.shape[2], name,
          " must be like x, ", Shape{model}, ", got ", Shape{x});
    CHECK(x.shape[2] == 1 || x.stride[2] == 1, name, " must be contiguous in its last dimension, got a stride of ",
          x.stride[2]);
    return {x.data, stride_of(x, 0), stride_of(x, 1)};
}

Rows rows(const char* name, const Tensor& y, const Tensor& x, const Tensor& model) {
    check_type(name, y);
    check_device(name, y, x);
    CHECK(y.dtype == model.dtype, name, " must be ", model.dtype, " like the output, got ", y.dtype);
    CHECK(y.rank == 2 && y.shape[0] == x.shape[0] && y.shape[1] >= 1 && y.shape[1] % x.shape[1] == 0 &&
              y.shape[1] <= x.shape[1] * x.shape[2],
          name, " must be [", x.shape[0], ", a multiple of the ", x.shape[1], " heads up to ", x.shape[1] * x.shape[2],
          "], got ", Shape{y});
    CHECK(y.shape[1] == model.shape[1], name, " must have rows of ", model.shape[1], ", got ", Shape{y});
    CHECK(y.shape[1] == 1 || y.stride[1] == 1, name, " must be contiguous in its last dimension, got a stride of ",
          y.stride[1]);
    return {y.data, stride_of(y, 0)};
}

Params params(const Tensor& x, const Tensor& gate, const Tensor& y, const char* y_name, const Tensor& statistics) {
    Params p{};
    p.x = parts("x", x, x);
    const Rows of_y = rows(y_name, y, x, y);
    p.out = p.dout = of_y;
    if (gate) p.gate = rows("gate", gate, x, y);
    CHECK(statistics && statistics.dtype == DType::kFloat32 && statistics.rank == 2 &&
              statistics.shape[0] == x.shape[0] && statistics.shape[1] == 2 && stride_of(statistics, 0) <= 2,
          "statistics must be contiguous torch.float32 [", x.shape[0], ", 2]");
    check_device("statistics", statistics, x);
    p.statistics = static_cast<float*>(statistics.data);
    p.rows = x.shape[0];
    p.heads = static_cast<int>(x.shape[1]);
    p.width = static_cast<int>(x.shape[2]);
    p.dim = static_cast<int>(y.shape[1] / x.shape[1]);
    return p;
}

#if !HSTU_EXT_CUDA
[[noreturn]] void fail_without_cuda() {
    fail<MissingKernelError>(
        "hstu_ext.gated_norm: x is on a GPU and this build has CPU kernels only. Install with nvcc on the PATH and "
        "`pip install . -C cmake.define.HSTU_EXT_CUDA=on` (CMake: -DHSTU_EXT_CUDA=on)");
}
#endif

}  // namespace

void forward(const Tensor& x, const Tensor& gate, const Tensor& out, const Tensor& statistics, double eps,
             Execution execution) {
    Params p = params(x, gate, out, "out", statistics);
    CHECK(eps > 0 && std::isfinite(eps), "eps must be positive, got ", eps);
    p.eps = static_cast<float>(eps);
#if HSTU_EXT_CUDA
    const DeviceGuard guard(x.device);
    launch_forward(p, x.dtype, out.dtype, x.device, execution.stream);
#else
    fail_without_cuda();
#endif
}

void backward(const Tensor& dout, const Tensor& x, const Tensor& gate, const Tensor& statistics, const Tensor& dx,
              const Tensor& dgate, Execution execution) {
    Params p = params(x, gate, dout, "dout", statistics);
    p.dx = parts("dx", dx, x);
    if (gate) p.dgate = rows("dgate", dgate, x, dout);
#if HSTU_EXT_CUDA
    const DeviceGuard guard(x.device);
    launch_backward(p, x.dtype, dout.dtype, x.device, execution.stream);
#else
    fail_without_cuda();
#endif
}

}  // namespace hstu::norm
