// The CPU kernels for AVX-512 F, BW, DQ and VL; CMakeLists.txt beside this file gives the flags.
#define HSTU_CPU_VARIANT avx512
#include "similarity/cpu/kernel_set.h"

namespace hstu::similarity::cpu {

const Kernels& avx512_kernels() { return HSTU_CPU_VARIANT::kKernels; }

}  // namespace hstu::similarity::cpu
