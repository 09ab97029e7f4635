// Reconstruction on a CUDA device. Arguments were checked by the caller; nothing here allocates or waits.
#pragma once

#include <cstdint>

#include "core/reconstruct.h"
#include "cuda/launch.h"

namespace csq::cuda {

// W of equation (3), in params.dtype. All addresses are of the current device.
LaunchStatus reconstruct_forward(const ReconstructParams& params, void* weight, Stream stream);

// Gradients (4), (5), (6); without a place for (4), the sums alone. scratch: reconstruct_scratch_size() doubles,
// contents arbitrary. Sums run in an order that follows from the shape alone: equal inputs give equal bits.
LaunchStatus reconstruct_backward(const ReconstructParams& params, const ReconstructGradients& gradients,
                                  double* scratch, Stream stream);
// Gradient (6) alone from the weight, for hard gates and float32 or bfloat16 logits; weight and gradient are float32.
// scratch: reconstruct_scratch_size() doubles for one plane.
LaunchStatus reconstruct_scale_gradient(const ReconstructParams& params, const float* grad_weight, const float* weight,
                                        float* grad_scale, double* scratch, Stream stream);
int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes);

}  // namespace csq::cuda
