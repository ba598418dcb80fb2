// The CPU kernels for AVX-512 (F, BW, DQ, VL); CMakeLists.txt beside this file gives the compiler flags.
#define HSTU_CPU_VARIANT avx512
#include "attention/cpu/kernel_set.h"

namespace hstu::attention::cpu {

const Kernels& avx512_kernels() { return HSTU_CPU_VARIANT::kKernels; }

}  // namespace hstu::attention::cpu
