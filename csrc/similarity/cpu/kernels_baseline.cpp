// The CPU kernels for the instruction set that every machine of the architecture has; CMakeLists.txt beside this file gives the flags.
#define HSTU_CPU_VARIANT baseline
#include "similarity/cpu/kernel_set.h"

namespace hstu::similarity::cpu {

const Kernels& baseline_kernels() { return HSTU_CPU_VARIANT::kKernels; }

}  // namespace hstu::similarity::cpu
