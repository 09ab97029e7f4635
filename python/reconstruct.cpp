// Reconstruction as functions of addresses, which come as integers, and sizes, which are checked once more.
#include "core/reconstruct.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/reconstruct.h"
#include "reconstruct_params.h"
#ifdef CSQ_WITH_CUDA
#include "cuda/reconstruct.h"
#include "cuda_launch.h"
#endif

namespace csq::python {
namespace {

namespace py = pybind11;

// Where a kernel runs: a number of threads on the processor, a stream on a CUDA device.
template <class Place>
using Forward = void (*)(const ReconstructParams&, void* weight, Place);
template <class Place>
using Backward = void (*)(const ReconstructParams&, const ReconstructGradients&, double* scratch, Place);

template <class Place>
void bind(py::module_& m, const std::string& prefix, const char* place_name, Forward<Place> forward,
          Backward<Place> backward, int64_t (*scratch_size)(int64_t, int64_t, int64_t, int)) {
    m.def((prefix + "reconstruct_forward").c_str(),
          [forward](Address bit_logits, Address gate_logits, Address scale, Address temperature, Address weight,
                    int64_t outer, int64_t channels, int64_t inner, const std::vector<int>& bits, int n_bits,
                    const std::string& dtype, bool gates_per_channel, bool scale_per_channel, bool hard_gates,
                    Place place) {
              auto params = parse_sizes(outer, channels, inner, bits, n_bits, dtype, gates_per_channel,
                                        scale_per_channel, hard_gates);
              parse_addresses(params, bit_logits, gate_logits, scale, temperature);
              forward(params, array<void>("weight", weight), place);
          },
          py::call_guard<py::gil_scoped_release>(), "Equation (3).", py::arg("bit_logits"), py::arg("gate_logits"),
          py::arg("scale"), py::arg("temperature"), py::arg("weight"), py::arg("outer"), py::arg("channels"),
          py::arg("inner"), py::arg("bits"), py::arg("n_bits"), py::arg("dtype"), py::arg("gates_per_channel"),
          py::arg("scale_per_channel"), py::arg("hard_gates"), py::arg(place_name));
    m.def((prefix + "reconstruct_backward").c_str(),
          [backward](Address grad_weight, Address bit_logits, Address gate_logits, Address scale, Address temperature,
                     Address grad_bit_logits, Address grad_gate_logits, Address grad_scale, Address scratch,
                     int64_t outer, int64_t channels, int64_t inner, const std::vector<int>& bits, int n_bits,
                     const std::string& dtype, bool gates_per_channel, bool scale_per_channel, bool hard_gates,
                     Place place) {
              auto params = parse_sizes(outer, channels, inner, bits, n_bits, dtype, gates_per_channel,
                                        scale_per_channel, hard_gates);
              parse_addresses(params, bit_logits, gate_logits, scale, temperature);
              ReconstructGradients gradients{};
              double* sums = nullptr;
              gradients.grad_weight = array<const void>("grad_weight", grad_weight);
              gradients.grad_weight_dtype = params.dtype;
              gradients.grad_scale = array<float>("grad_scale", grad_scale);
              if (params.planes > 0) {
                  gradients.grad_bit_logits = array<void>("grad_bit_logits", grad_bit_logits);
                  gradients.grad_gate_logits = array<float>("grad_gate_logits", grad_gate_logits);
                  sums = array<double>("scratch", scratch);
              }
              backward(params, gradients, sums, place);
          },
          py::call_guard<py::gil_scoped_release>(),
          "Equations (4), (5), (6); scratch holds as many doubles as the function of that name says.",
          py::arg("grad_weight"), py::arg("bit_logits"), py::arg("gate_logits"), py::arg("scale"),
          py::arg("temperature"), py::arg("grad_bit_logits"), py::arg("grad_gate_logits"), py::arg("grad_scale"),
          py::arg("scratch"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("bits"),
          py::arg("n_bits"), py::arg("dtype"), py::arg("gates_per_channel"), py::arg("scale_per_channel"),
          py::arg("hard_gates"), py::arg(place_name));
    m.def((prefix + "reconstruct_scratch_size").c_str(),
          [scratch_size](int64_t outer, int64_t channels, int64_t inner, int planes) {
              require_weight(outer, channels, inner);
              require_from("planes", planes, 0);
              if (planes > kMaxPlanes)
                  fail("planes", "of at most " + std::to_string(kMaxPlanes), std::to_string(planes));
              return scratch_size(outer, channels, inner, planes);
          },
          "Doubles of scratch that the backward pass needs for this shape.", py::arg("outer"), py::arg("channels"),
          py::arg("inner"), py::arg("planes"));
}

}  // namespace

void bind_reconstruct(py::module_& m) {
    bind<int>(
        m, "", "threads",
        [](const ReconstructParams& params, void* weight, int threads) {
            require_from("threads", threads, 1);
            cpu::reconstruct_forward(params, weight, threads);
        },
        [](const ReconstructParams& params, const ReconstructGradients& gradients, double* scratch, int threads) {
            require_from("threads", threads, 1);
            cpu::reconstruct_backward(params, gradients, scratch, threads);
        },
        cpu::reconstruct_scratch_size);
#ifdef CSQ_WITH_CUDA
    bind<Address>(
        m, "cuda_", "stream",
        [](const ReconstructParams& params, void* weight, Address stream) {
            require_launched(cuda::reconstruct_forward(params, weight, stream_of(stream)));
        },
        [](const ReconstructParams& params, const ReconstructGradients& gradients, double* scratch, Address stream) {
            require_launched(cuda::reconstruct_backward(params, gradients, scratch, stream_of(stream)));
        },
        cuda::reconstruct_scratch_size);
#endif
}

}  // namespace csq::python
