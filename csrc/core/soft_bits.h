// Per-weight arithmetic of (1), (3) and (4) for processors with approximate exponential and reciprocal instructions.
// Instructions stands for them, or for a model of them:
//   exp2(x)        2^x within 2 ulp; 0 instead of a denormal number, infinity beyond the range
//   reciprocal(x)  1 / x within 1 ulp, exact at powers of two; 0 instead of a denormal number
//   smaller(x, y)  the smaller one, NaN if either is
//   fma(x, y, z)   x y + z, rounded once
// Bounds are worst cases in fp32, u = 2^-24 = 6e-8, z = beta * logit.
#pragma once

#include "core/host_device.h"

namespace csq {

// exp(-z) = 2^(rate * logit).
CSQ_HD float exponent_rate(float temperature) {
    return static_cast<float>(-1.4426950408889634 * static_cast<double>(temperature));
}

// Equation (1), 2 special-function operations. rate and exponent round once each, so exp(-z) errs by (2 |z| + 4) u, of
// which a sigmoid keeps at most the part P (1 - P); with the addition and the reciprocal 4.2 u in all.
template <class Instructions>
CSQ_HD float soft_bit(float logit, float rate) {
    return Instructions::reciprocal(1.0f + Instructions::exp2(rate * logit));
}

// dP / dz = P (1 - P) of (4): exactly 0 where the bit is decided.
template <class Instructions>
CSQ_HD float soft_bit_slope(float bit) {
    return Instructions::fma(-bit, bit, bit);
}

// P - N of (3) with 3 special-function operations instead of 4: for a = exp(-z_p), b = exp(-z_q),
//   1 / (1 + a) - 1 / (1 + b) = (b - a) / ((1 + a) (1 + b)).
// The limit keeps the product finite and its reciprocal normal. It is far above 2^24, so decided bits give exactly -1,
// 0 or 1; at most 2^-63 of a bit is lost. Error: 1.2 u from each exponential, 6 u |P - N| from the rest: 8.4 u in all.
template <class Instructions>
CSQ_HD float digit(float positive_logit, float negative_logit, float rate) {
    constexpr float kLimit = 9223372036854775808.0f;  // 2^63
    const float a = Instructions::smaller(Instructions::exp2(rate * positive_logit), kLimit);
    const float b = Instructions::smaller(Instructions::exp2(rate * negative_logit), kLimit);
    const float one_plus_a = 1.0f + a;
    return (b - a) * Instructions::reciprocal(Instructions::fma(one_plus_a, b, one_plus_a));
}

}  // namespace csq
