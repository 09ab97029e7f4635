// The single-pass step: logits, momenta and the next weight from dL/dW, in one pass. The arguments, the rule by which a
// logit moves, and the narrow formats, for every device.
#pragma once

#include "core/reconstruct.h"

namespace csq {

// Values that share a scale in an 8-bit momentum, neighbours in a plane of the weight.
constexpr int64_t kMomentumBlock = 256;
constexpr float kLargestFloat8 = 448.0f;

// How a logit x moves for its gradient g, `sign` included, with momenta m and v:
//   0 momenta   x -= lr g
//   1 (SGD)     m = decay m + gain g;                                     x -= lr (kept m + direct g)
//   2 (Adam)    m += gain (g - m); v = second_decay v + second_gain g^2;  x -= lr m / (root sqrt(v) + epsilon)
struct StepRule {
    int32_t momenta;
    float sign, lr, decay, gain, kept, direct, second_decay, second_gain, root, epsilon;
};

// All arrays are contiguous; a weight and its planes are [outer, channels, inner] as in ReconstructParams.
struct StepParams {
    ReconstructParams before;  // of the weight that the gradient belongs to; its logits are bit_logits
    const float* gate_logits;  // of the next weight, as are the scale and the temperature
    const float* scale;
    const float* temperature;
    const void* grad_weight;  // D, in the weight's dtype
    void* weight;             // written
    DType weight_dtype;
    void* bit_logits;           // [2, k, weight] of before.dtype, float32 or bfloat16; 16 bits round stochastically
    void* momenta[2];           // [2, k, weight]: float32, or float8 (e4m3) with a scale for each block of a plane
    float* momentum_scales[2];  // [2, k, ceil(weight / kMomentumBlock)], null for float32
    StepRule rule;
    uint32_t key;  // of this layer's random numbers in this step
};

// The random number at a place: a counter and a key, mixed so that neighbours are independent. The constants are those
// of the 32-bit mixer "lowbias32" by C. Wellons (public domain).
CSQ_HD uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
// What sets the random numbers of the two momenta apart from those of the logits.
constexpr uint32_t kMomentumKeys[2] = {0x9e3779b9u, 0x85ebca6bu};

}  // namespace csq
