// The kernels for x86 processors with AVX2, FMA and F16C.
#include "cpu/kernels.h"

#if CSQ_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/reconstruct_kernel.h"
#include "cpu/step_kernel.h"
#include "cpu/vector_avx2.h"

namespace csq::cpu {

const ReconstructKernels kAvx2Kernels = kKernels<Avx2>;
const StepKernels kAvx2Step = kStepKernels<Avx2>;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
