// The table of kernels that each instruction set fills, and all that reconstruct_kernel.h needs from outside its
// region.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "core/reconstruct.h"
#include "core/soft_bits.h"
#include "core/step.h"
#include "cpu/reconstruct_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define CSQ_X86 1
#else
#define CSQ_X86 0
#endif

namespace csq::cpu {

// Compute the units begin .. end - 1 of the tiling of the shape.
using ForwardUnits = void (*)(const ReconstructParams&, void* weight, int64_t begin, int64_t end);
using BackwardUnits = void (*)(const ReconstructParams&, const ReconstructGradients&, double* partial, bool stream,
                               int64_t begin, int64_t end);

// Indexed by DType.
struct ReconstructKernels {
    ForwardUnits forward[3];
    BackwardUnits backward[3];
};

// Compute the tiles begin .. end - 1, of kTile weights each, wherever their channels begin. Indexed by DType.
using StepTiles = void (*)(const StepParams&, int64_t begin, int64_t end);
using ScaleSumUnits = void (*)(const ReconstructParams&, const float* grad_weight, const float* weight, double* partial,
                               int64_t begin, int64_t end);
struct StepKernels {
    StepTiles update[2];
    ScaleSumUnits scale_sums;
};

extern const ReconstructKernels kScalarKernels;
extern const StepKernels kScalarStep;
#if CSQ_X86
extern const ReconstructKernels kAvx2Kernels, kAvx512Kernels;
extern const StepKernels kAvx2Step, kAvx512Step;
#endif

}  // namespace csq::cpu
