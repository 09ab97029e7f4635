// Reconstruction on a CUDA device. Arguments were checked by the caller; nothing here allocates or waits.
#pragma once

#include <cstdint>

#include "core/reconstruct.h"
#include "cuda/launch.h"

namespace csq::cuda {

// W of equation (3), in params.dtype. All addresses are of the current device.
LaunchStatus reconstruct_forward(const ReconstructParams& params, void* weight, Stream stream);

// Gradients (4), (5), (6). scratch: reconstruct_scratch_size() doubles, contents arbitrary.
// Sums run in an order that follows from the shape alone: equal inputs give equal bits.
LaunchStatus reconstruct_backward(const ReconstructParams& params, const ReconstructGradients& gradients,
                                  double* scratch, Stream stream);
int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes);

}  // namespace csq::cuda
