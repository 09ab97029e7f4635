// The single-pass step on a CUDA device. Arguments were checked by the caller; nothing here allocates or waits.
#pragma once

#include <cstdint>

#include "core/step.h"
#include "cuda/launch.h"

namespace csq::cuda {

// One step of all layers, which lie on the current device: as few launches as their kinds and numbers allow. scratch:
// step_scratch_size() floats, contents arbitrary.
LaunchStatus step_update(const StepParams* layers, int count, float* scratch, Stream stream);
int64_t step_scratch_size(const StepParams* layers, int count);

}  // namespace csq::cuda
