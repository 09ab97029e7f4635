// The kernels for x86 processors with AVX-512 F, BW, DQ and VL.
#include "cpu/kernels.h"

#if CSQ_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#include "cpu/reconstruct_kernel.h"
#include "cpu/step_kernel.h"
#include "cpu/vector_avx512.h"

namespace csq::cpu {

const ReconstructKernels kAvx512Kernels = kKernels<Avx512>;
const StepKernels kAvx512Step = kStepKernels<Avx512>;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
