// The CPU kernels for AVX2 with FMA and F16C; CMakeLists.txt beside this file gives the flags.
#define HSTU_CPU_VARIANT avx2
#include "similarity/cpu/kernel_set.h"

namespace hstu::similarity::cpu {

const Kernels& avx2_kernels() { return HSTU_CPU_VARIANT::kKernels; }

}  // namespace hstu::similarity::cpu
