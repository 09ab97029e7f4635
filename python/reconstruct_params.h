// The arguments of a weight's reconstruction, checked once more where they become addresses.
#pragma once

#include <string>
#include <vector>

#include "bindings.h"
#include "core/reconstruct.h"

namespace csq::python {

inline DType parse_dtype(const std::string& name) {
    if (name == "float32") return DType::f32;
    if (name == "bfloat16") return DType::bf16;
    if (name == "float16") return DType::f16;
    fail("dtype", "as float32, bfloat16 or float16", name);
}

// So that no product of the sizes of a weight, its planes and their bytes overflows.
inline void require_weight(int64_t outer, int64_t channels, int64_t inner) {
    require_from("outer", outer, 1);
    require_from("channels", channels, 1);
    require_from("inner", inner, 1);
    int64_t bytes = 8 * kMaxPlanes;
    for (const int64_t size : {outer, channels, inner}) {
        if (__builtin_mul_overflow(bytes, size, &bytes)) {
            fail("outer * channels * inner", "that fits in memory",
                 std::to_string(outer) + " * " + std::to_string(channels) + " * " + std::to_string(inner));
        }
    }
}

// The sizes of ReconstructParams; its addresses are filled in by the caller.
inline ReconstructParams parse_sizes(int64_t outer, int64_t channels, int64_t inner, const std::vector<int>& bits,
                                     int n_bits, const std::string& dtype, bool gates_per_channel,
                                     bool scale_per_channel, bool hard_gates) {
    require_weight(outer, channels, inner);
    if (n_bits < 1 || n_bits > kMaxPlanes) {
        fail("n_bits", "from 1 to " + std::to_string(kMaxPlanes), std::to_string(n_bits));
    }
    ReconstructParams params{};
    int previous = -1;
    for (const int bit : bits) {
        if (bit <= previous || bit >= n_bits) {
            fail("bits", "as increasing integers from 0 to " + std::to_string(n_bits - 1),
                 std::to_string(bit) + " after " + std::to_string(previous));
        }
        params.bits[params.planes++] = previous = bit;
    }
    params.outer = outer;
    params.channels = channels;
    params.inner = inner;
    params.n_bits = n_bits;
    params.dtype = parse_dtype(dtype);
    params.gates_per_channel = gates_per_channel;
    params.scale_per_channel = scale_per_channel;
    params.hard_gates = hard_gates;
    return params;
}

inline void parse_addresses(ReconstructParams& params, Address bit_logits, Address gate_logits, Address scale,
                            Address temperature) {
    if (params.planes > 0) {
        params.bit_logits = array<const void>("bit_logits", bit_logits);
        params.gate_logits = array<const float>("gate_logits", gate_logits);
    }
    params.scale = array<const float>("scale", scale);
    params.temperature = array<const float>("temperature", temperature);
}

}  // namespace csq::python
