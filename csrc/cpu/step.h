// The single-pass step on the processor.
#pragma once

#include <vector>

#include "core/step.h"

namespace csq::cpu {

// Equation (6) from the weight that the scale made, for float32: sum(D W) / s. `scratch` holds as many doubles as
// step_scratch_size says.
void step_scale_sums(const ReconstructParams& params, const float* grad_weight, const float* weight, float* grad_scale,
                     double* scratch, int threads);
int64_t step_scratch_size(int64_t outer, int64_t channels, int64_t inner);

// One step of all layers: the threads share their tiles.
void step_update(const std::vector<StepParams>& layers, int threads);

}  // namespace csq::cpu
