// The single-pass step as functions of addresses, which come as integers, and sizes, which are checked once more.
#include "core/step.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/reconstruct.h"
#include "cpu/step.h"
#include "reconstruct_params.h"
#ifdef CSQ_WITH_CUDA
#include "cuda/reconstruct.h"
#include "cuda/step.h"
#include "cuda_launch.h"
#endif

namespace csq::python {
namespace {

namespace py = pybind11;

// gate_logits, scale, temperature
using Vectors = std::array<Address, 3>;

StepRule make_rule(int momenta, float sign, float lr, float decay, float gain, float kept, float direct,
                   float second_decay, float second_gain, float root, float epsilon) {
    require_from("momenta", momenta, 0);
    if (momenta > 2) fail("momenta", "of at most 2", std::to_string(momenta));
    return {momenta, sign, lr, decay, gain, kept, direct, second_decay, second_gain, root, epsilon};
}

StepParams make_layer(Address bit_logits, const Vectors& before, const Vectors& after, Address grad_weight,
                      Address weight, const std::string& weight_dtype, const std::vector<Address>& momenta,
                      const std::vector<Address>& momentum_scales, const StepRule& rule, uint32_t key, int64_t outer,
                      int64_t channels, int64_t inner, const std::vector<int>& bits, int n_bits,
                      const std::string& dtype, bool gates_per_channel, bool scale_per_channel, bool hard_gates) {
    StepParams layer{};
    layer.before =
        parse_sizes(outer, channels, inner, bits, n_bits, dtype, gates_per_channel, scale_per_channel, hard_gates);
    parse_addresses(layer.before, bit_logits, before[0], before[1], before[2]);
    layer.weight_dtype = parse_dtype(weight_dtype);
    if (layer.before.dtype == DType::f16 || layer.weight_dtype == DType::f16) {
        fail("dtype and weight_dtype", "as float32 or bfloat16", dtype + " and " + weight_dtype);
    }
    layer.scale = array<const float>("scale", after[1]);
    layer.temperature = array<const float>("temperature", after[2]);
    layer.grad_weight = array<const void>("grad_weight", grad_weight);
    layer.weight = array<void>("weight", weight);
    layer.rule = rule;
    layer.key = key;
    if (layer.before.planes == 0) return layer;
    layer.gate_logits = array<const float>("gate_logits", after[0]);
    layer.bit_logits = array<void>("bit_logits", bit_logits);
    const auto count = static_cast<size_t>(rule.momenta);
    if (momenta.size() != count) {
        fail("momenta", "as " + std::to_string(count) + " addresses", std::to_string(momenta.size()));
    }
    if (!momentum_scales.empty() && momentum_scales.size() != count) {
        fail("momentum_scales", "as none or " + std::to_string(count) + " addresses",
             std::to_string(momentum_scales.size()));
    }
    for (size_t m = 0; m < count; ++m) {
        layer.momenta[m] = array<void>("momenta", momenta[m]);
        if (!momentum_scales.empty()) layer.momentum_scales[m] = array<float>("momentum_scales", momentum_scales[m]);
    }
    return layer;
}

// What step_sums writes to; sums is where it adds up, none without planes.
ReconstructGradients parse_sums(const StepParams& layer, Address grad_gate_logits, Address grad_scale, Address scratch,
                                double*& sums) {
    if (layer.weight_dtype != DType::f32 && layer.weight_dtype != layer.before.dtype) {
        fail("weight_dtype", "as float32 or that of the logits", "another");
    }
    ReconstructGradients gradients{};
    gradients.grad_weight = layer.grad_weight;
    gradients.grad_weight_dtype = layer.weight_dtype;
    gradients.grad_scale = array<float>("grad_scale", grad_scale);
    sums = nullptr;
    if (layer.before.planes > 0) {
        gradients.grad_gate_logits = array<float>("grad_gate_logits", grad_gate_logits);
        sums = array<double>("scratch", scratch);
    }
    return gradients;
}

void require_float32_weight(const StepParams& layer) {
    if (layer.weight_dtype != DType::f32) fail("weight_dtype", "as float32", "another");
}

void step_sums(const StepParams& layer, Address grad_gate_logits, Address grad_scale, Address scratch, int threads) {
    require_from("threads", threads, 1);
    double* sums;
    const auto gradients = parse_sums(layer, grad_gate_logits, grad_scale, scratch, sums);
    cpu::reconstruct_backward(layer.before, gradients, sums, threads);
}

void step_scale_sums(const StepParams& layer, Address grad_scale, Address scratch, int threads) {
    require_from("threads", threads, 1);
    require_float32_weight(layer);
    cpu::step_scale_sums(layer.before, static_cast<const float*>(layer.grad_weight),
                         static_cast<const float*>(layer.weight), array<float>("grad_scale", grad_scale),
                         array<double>("scratch", scratch), threads);
}

#ifdef CSQ_WITH_CUDA
void cuda_step_sums(const StepParams& layer, Address grad_gate_logits, Address grad_scale, Address scratch,
                    Address stream) {
    double* sums;
    const auto gradients = parse_sums(layer, grad_gate_logits, grad_scale, scratch, sums);
    require_launched(cuda::reconstruct_backward(layer.before, gradients, sums, stream_of(stream)));
}

void cuda_step_scale_sums(const StepParams& layer, Address grad_scale, Address scratch, Address stream) {
    require_float32_weight(layer);
    require_launched(cuda::reconstruct_scale_gradient(
        layer.before, static_cast<const float*>(layer.grad_weight), static_cast<const float*>(layer.weight),
        array<float>("grad_scale", grad_scale), array<double>("scratch", scratch), stream_of(stream)));
}
#endif

}  // namespace

void bind_step(py::module_& m) {
    m.attr("momentum_block") = kMomentumBlock;
    py::class_<StepRule>(m, "StepRule", "How a logit moves for its gradient, see csrc/core/step.h.")
        .def(py::init(&make_rule), py::kw_only(), py::arg("momenta"), py::arg("sign"), py::arg("lr"), py::arg("decay"),
             py::arg("gain"), py::arg("kept"), py::arg("direct"), py::arg("second_decay"), py::arg("second_gain"),
             py::arg("root"), py::arg("epsilon"));
    py::class_<StepParams>(m, "StepLayer", "One layer of a single-pass step; it keeps the addresses, not the arrays.")
        .def(py::init(&make_layer), py::kw_only(), py::arg("bit_logits"), py::arg("before"), py::arg("after"),
             py::arg("grad_weight"), py::arg("weight"), py::arg("weight_dtype"), py::arg("momenta"),
             py::arg("momentum_scales"), py::arg("rule"), py::arg("key"), py::arg("outer"), py::arg("channels"),
             py::arg("inner"), py::arg("bits"), py::arg("n_bits"), py::arg("dtype"), py::arg("gates_per_channel"),
             py::arg("scale_per_channel"), py::arg("hard_gates"));
    m.def("step_sums", &step_sums, py::call_guard<py::gil_scoped_release>(),
          "Equations (5) and (6); scratch holds as many doubles as reconstruct_scratch_size says.", py::arg("layer"),
          py::arg("grad_gate_logits"), py::arg("grad_scale"), py::arg("scratch"), py::arg("threads"));
    m.def("step_scale_sums", &step_scale_sums, py::call_guard<py::gil_scoped_release>(),
          "Equation (6) from the weight, where no scale is 0; scratch holds as many doubles as step_scratch_size says.",
          py::arg("layer"), py::arg("grad_scale"), py::arg("scratch"), py::arg("threads"));
    m.def(
        "step_scratch_size",
        [](int64_t outer, int64_t channels, int64_t inner) {
            require_weight(outer, channels, inner);
            return cpu::step_scratch_size(outer, channels, inner);
        },
        "Doubles of scratch that step_scale_sums needs.", py::arg("outer"), py::arg("channels"), py::arg("inner"));
    m.def(
        "step_update",
        [](const std::vector<StepParams>& layers, int threads) {
            require_from("threads", threads, 1);
            cpu::step_update(layers, threads);
        },
        py::call_guard<py::gil_scoped_release>(), "Logits, momenta and weights of all layers, in place.",
        py::arg("layers"), py::arg("threads"));
#ifdef CSQ_WITH_CUDA
    m.def("cuda_step_sums", &cuda_step_sums, py::call_guard<py::gil_scoped_release>(),
          "Equations (5) and (6); scratch holds as many doubles as cuda_reconstruct_scratch_size says.",
          py::arg("layer"), py::arg("grad_gate_logits"), py::arg("grad_scale"), py::arg("scratch"), py::arg("stream"));
    m.def("cuda_step_scale_sums", &cuda_step_scale_sums, py::call_guard<py::gil_scoped_release>(),
          "Equation (6) from the weight, for any scale; scratch holds as many doubles as cuda_reconstruct_scratch_size "
          "says for one plane.",
          py::arg("layer"), py::arg("grad_scale"), py::arg("scratch"), py::arg("stream"));
    m.def(
        "cuda_step_scratch_size",
        [](const std::vector<StepParams>& layers) {
            return cuda::step_scratch_size(layers.data(), static_cast<int>(layers.size()));
        },
        "Floats of scratch that cuda_step_update needs.", py::arg("layers"));
    m.def(
        "cuda_step_update",
        [](const std::vector<StepParams>& layers, Address scratch, Address stream) {
            require_launched(cuda::step_update(layers.data(), static_cast<int>(layers.size()),
                                               array<float>("scratch", scratch), stream_of(stream)));
        },
        py::call_guard<py::gil_scoped_release>(),
        "Logits, momenta and weights of all layers of a device, in place; scratch as cuda_step_scratch_size says.",
        py::arg("layers"), py::arg("scratch"), py::arg("stream"));
#endif
}

}  // namespace csq::python
