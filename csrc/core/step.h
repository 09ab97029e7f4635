// The single-pass step: logits, momenta and the next weight from dL/dW, in one pass. The arguments, the rule by which a
// logit moves, and the narrow formats, for every device.
#pragma once

#include "core/half.h"
#include "core/reconstruct.h"

namespace csq {

// Values that share a scale in an 8-bit momentum, neighbours in a plane of the weight.
constexpr int64_t kMomentumBlock = 256;
constexpr float kLargestFloat8 = 448.0f;
// The largest value of a block above which it has a scale: the inverse of less would overflow, and no logit can feel
// it.
constexpr float kSmallestBlock = 0x1p-100f;

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

// Rounded to bfloat16, up or down as 16 random bits decide; storing it then rounds nothing.
CSQ_HD float round_logit(float x, uint32_t random) {
    const uint32_t bits = float_bits(x);
    // An exponent of all ones has nothing to round: infinity would become NaN, and NaN something else.
    const bool finite = (bits & 0x7f800000u) < 0x7f800000u;
    return bits_float((finite ? bits + (random >> 16) : bits) & 0xffff0000u);
}

// float8 e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; below 2^-6 in steps of 2^-9.
CSQ_HD float from_float8(uint32_t code) {
    const uint32_t magnitude = code & 0x7fu;
    const float normal = bits_float((magnitude << 20) + (120u << 23));
    // With the exponent of 2^-6 the mantissa says how far above 2^-6 the value would be.
    const float small = bits_float((magnitude << 20) | (121u << 23)) - 0x1p-6f;
    return bits_float(float_bits(magnitude < 8 ? small : normal) | (code & 0x80u) << 24);
}
// Stochastic: 20 random bits decide the 20 that are dropped.
CSQ_HD uint32_t to_float8(float x, uint32_t random) {
    const float size = fminf(fabsf(x), kLargestFloat8);
    const uint32_t dropped = random >> 12;
    const uint32_t normal = ((float_bits(size) + dropped) >> 20) - (120u << 3);
    const float steps = size * 0x1p9f + static_cast<float>(static_cast<int32_t>(dropped)) * 0x1p-20f;
    const uint32_t code = size < 0x1p-6f ? static_cast<uint32_t>(static_cast<int32_t>(steps)) : normal;
    return code | (float_bits(x) >> 24 & 0x80u);
}

// The next logit for its gradient g; the momenta move with it. Instructions as in core/soft_bits.h, and
//   root(x)         square root within 1 ulp
//   quotient(x, y)  x / y within 2 ulp
template <int Momenta, class Instructions>
CSQ_HD float move_logit(const StepRule& rule, float x, float g, float (&momenta)[2]) {
    if constexpr (Momenta == 0) {
        return Instructions::fma(-rule.lr, g, x);
    } else if constexpr (Momenta == 1) {
        momenta[0] = Instructions::fma(rule.decay, momenta[0], rule.gain * g);
        return Instructions::fma(-rule.lr, Instructions::fma(rule.kept, momenta[0], rule.direct * g), x);
    } else {
        momenta[0] = Instructions::fma(rule.gain, g - momenta[0], momenta[0]);
        momenta[1] = Instructions::fma(rule.second_decay, momenta[1], rule.second_gain * (g * g));
        const float size = Instructions::fma(rule.root, Instructions::root(momenta[1]), rule.epsilon);
        return Instructions::fma(-rule.lr, Instructions::quotient(momenta[0], size), x);
    }
}

}  // namespace csq
