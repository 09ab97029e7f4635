// The kernels for any processor: a vector of one float.
#include "cpu/kernels.h"
#include "cpu/reconstruct_kernel.h"
#include "cpu/step_kernel.h"
#include "cpu/vector_scalar.h"

namespace csq::cpu {

const ReconstructKernels kScalarKernels = kKernels<Scalar>;
const StepKernels kScalarStep = kStepKernels<Scalar>;

}  // namespace csq::cpu
