// 16-bit floats as bits, converted as IEEE 754 asks: to nearest, ties to even. For processors without instructions for
// it.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace csq {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

CSQ_HD uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
CSQ_HD float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    // Shifting the exponent field in place scales by 2^-112; multiplying it back also normalises subnormals.
    const float value = bits_float(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_float(float_bits(value) | special | sign);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 1/2 leaves the value in units of 2^-24 in the low mantissa bits, rounded by the addition.
        return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

}  // namespace csq
