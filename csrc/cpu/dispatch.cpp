// Chooses the instruction set, shares the units of work among the threads, and finishes the sums.
#include <atomic>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/reconstruct.h"

namespace csq::cpu {
namespace {

// Bits (weights times planes) from which waking a team of threads pays.
constexpr int64_t kParallelBits = 32768;
// Bytes of logit gradients from which they go past the caches: nobody reads so much before it would be evicted.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

Isa best_isa() {
    Isa best = Isa::scalar;
    for (const Isa isa : kIsas) {
        if (isa_supported(isa)) best = isa;
    }
    return best;
}

std::atomic<Isa>& chosen_isa() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

const ReconstructKernels& kernels() {
    switch (current_isa()) {
#if CSQ_X86
        case Isa::avx512:
        case Isa::avx512_vnni:
        case Isa::avx512_vbmi:
            return kAvx512Kernels;
        case Isa::avx2:
            return kAvx2Kernels;
#endif
        default:
            return kScalarKernels;
    }
}

template <class Work>
void share(const ReconstructParams& a, int64_t units, int threads, const Work& work) {
    const int64_t bits = a.outer * a.channels * a.inner * a.planes;
    const int64_t team = bits < kParallelBits ? 1 : std::min<int64_t>(threads, units);
    if (team <= 1) {
        work(0, units);
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
    for (int64_t member = 0; member < team; ++member) {
        work(units * member / team, units * (member + 1) / team);
    }
}

// Equations (5) and (6) from T[channel][plane] = sum D (P - N).
void finish(const ReconstructParams& a, const ReconstructGradients& g, const double* sums) {
    const double beta = *a.temperature;
    const double levels = (1 << a.n_bits) - 1;
    const int64_t gates = a.planes * (a.gates_per_channel ? a.channels : 1);
    std::fill_n(g.grad_gate_logits, gates, 0.0f);
    double layer_gates[kMaxPlanes] = {};
    double layer_scale = 0.0;
    for (int64_t channel = 0; channel < a.channels; ++channel) {
        const double scale = a.scale[a.scale_per_channel ? channel : 0];
        double grad_scale = 0.0;
        for (int k = 0; k < a.planes; ++k) {
            const int64_t index = a.gates_per_channel ? k * a.channels + channel : k;
            const double open = precise_gate(a.gate_logits[index], *a.temperature, a.hard_gates);
            // A plane whose gate is 0 was not read: it has no sum, and no part in the gradients.
            if (open == 0.0) continue;
            const double sum = static_cast<double>(1 << a.bits[k]) / levels * sums[channel * a.planes + k];
            grad_scale += open * sum;
            if (a.hard_gates) continue;
            const double grad_gate = beta * open * (1.0 - open) * scale * sum;
            if (a.gates_per_channel) {
                g.grad_gate_logits[index] = static_cast<float>(grad_gate);
            } else {
                layer_gates[k] += grad_gate;
            }
        }
        if (a.scale_per_channel) {
            g.grad_scale[channel] = static_cast<float>(grad_scale);
        } else {
            layer_scale += grad_scale;
        }
    }
    if (!a.gates_per_channel) {
        for (int k = 0; k < a.planes; ++k) g.grad_gate_logits[k] = static_cast<float>(layer_gates[k]);
    }
    if (!a.scale_per_channel) g.grad_scale[0] = static_cast<float>(layer_scale);
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512_vbmi:
            return "avx512_vbmi";
        case Isa::avx512_vnni:
            return "avx512_vnni";
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "scalar";
    }
}

bool isa_supported(Isa isa) {
#if CSQ_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return fma && __builtin_cpu_supports("avx2");
    const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512) return wide;
    const bool products = wide && __builtin_cpu_supports("avx512vnni");
    if (isa == Isa::avx512_vnni) return products;
    if (isa == Isa::avx512_vbmi) {
        return products && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
    }
#endif
    return isa == Isa::scalar;
}

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }
void force_isa(Isa isa) { chosen_isa().store(isa, std::memory_order_relaxed); }

void reconstruct_forward(const ReconstructParams& params, void* weight, int threads) {
    const auto compute = kernels().forward[static_cast<int>(params.dtype)];
    const Tiling t = tiling(params.outer, params.channels, params.inner);
    share(params, t.units, threads, [&](int64_t begin, int64_t end) { compute(params, weight, begin, end); });
}

int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes) {
    return tiling(outer, channels, inner).slots * channels * planes;
}

void reconstruct_backward(const ReconstructParams& params, const ReconstructGradients& gradients, double* scratch,
                          int threads) {
    const auto compute = kernels().backward[static_cast<int>(params.dtype)];
    const Tiling t = tiling(params.outer, params.channels, params.inner);
    const int64_t element = params.dtype == DType::f32 ? 4 : 2;
    const int64_t bytes = 2 * element * params.planes * params.outer * params.channels * params.inner;
    share(params, t.units, threads,
          [&](int64_t begin, int64_t end) { compute(params, gradients, scratch, bytes >= kStreamBytes, begin, end); });
    const int64_t stride = params.channels * params.planes;
    for (int64_t slot = 1; slot < t.slots; ++slot) {
        for (int64_t i = 0; i < stride; ++i) scratch[i] += scratch[slot * stride + i];
    }
    finish(params, gradients, scratch);
}

}  // namespace csq::cpu
