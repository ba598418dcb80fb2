// The CPU kernels for AVX2 with FMA and F16C; CMakeLists.txt beside this file gives the compiler flags.
#define HSTU_CPU_VARIANT avx2
#include "attention/cpu/kernel_set.h"

namespace hstu::attention::cpu {

const Kernels& avx2_kernels() { return HSTU_CPU_VARIANT::kKernels; }

}  // namespace hstu::attention::cpu
