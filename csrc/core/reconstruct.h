// Reconstruction of the weight, equations (1) to (6): the arguments and the arithmetic that every device shares.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace csq {

constexpr int kMaxPlanes = 16;

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// All arrays are contiguous. The weight is seen as [outer, channels, inner]; when neither the gates nor the scale are
// per channel, outer = channels = 1. k = planes; dtype is that of bit_logits, the weight and both their gradients.
struct ReconstructParams {
    int64_t outer;
    int64_t channels;
    int64_t inner;
    int32_t planes;            // stored planes k, 0..16
    int32_t n_bits;            // n of the normaliser 2^n - 1
    int32_t bits[kMaxPlanes];  // exponent b of each stored plane, increasing
    DType dtype;
    bool gates_per_channel;
    bool scale_per_channel;
    bool hard_gates;  // gates are [u > 0] and get no gradient

    const void* bit_logits;    // [2, k, outer, channels, inner]
    const float* gate_logits;  // [k] or [k, channels]
    const float* scale;        // [1] or [channels]
    const float* temperature;  // [1]
};

// The inputs and outputs of the backward pass; grad_gate_logits and grad_scale have the shapes of what they belong to.
struct ReconstructGradients {
    const void* grad_weight;  // [outer, channels, inner]
    DType grad_weight_dtype;  // that of the logits; float32 will do too where the sums alone are wanted
    void* grad_bit_logits;    // [2, k, outer, channels, inner], or null: the sums alone are wanted
    float* grad_gate_logits;  // [k] or [k, channels]
    float* grad_scale;        // [1] or [channels]
};

// Below this argument a sigmoid is exactly 0: the rest would be denormal, invisible in a weight, and slow.
constexpr float kSigmoidZero = -87.0f;

// Equation (2) or the gate part of (7). In double: a gate multiplies a whole plane, so its error is not averaged away,
// and the sums need 1 - G when G is almost 1.
CSQ_HD double precise_gate(float logit, float temperature, bool hard) {
    if (hard) return logit > 0.0f ? 1.0 : 0.0;
    const double x = static_cast<double>(temperature) * static_cast<double>(logit);
    return x < static_cast<double>(kSigmoidZero) ? 0.0 : 1.0 / (1.0 + exp(-x));
}
CSQ_HD float gate(float logit, float temperature, bool hard) {
    return static_cast<float>(precise_gate(logit, temperature, hard));
}

// s / (2^n - 1): the last factor of (3), one rounding.
CSQ_HD float step_size(float scale, int n_bits) { return scale / static_cast<float>((1 << n_bits) - 1); }

}  // namespace csq
