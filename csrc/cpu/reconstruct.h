// Reconstruction on the processor. Arguments were checked by the caller; nothing here allocates.
#pragma once

#include <cstdint>

#include "core/reconstruct.h"

namespace csq::cpu {

// W of equation (3), contiguous, in params.dtype.
void reconstruct_forward(const ReconstructParams& params, void* weight, int threads);

// Gradients (4), (5), (6). scratch: reconstruct_scratch_size() doubles, contents arbitrary.
// The result does not depend on the number of threads, not even in its last bit.
void reconstruct_backward(const ReconstructParams& params, const ReconstructGradients& gradients, double* scratch,
                          int threads);
int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes);

}  // namespace csq::cpu
