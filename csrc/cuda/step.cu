#include <climits>

#include "core/soft_bits.h"
#include "cuda/elements.h"
#include "cuda/step.h"
#include "cuda/tiling.h"

namespace csq::cuda {
namespace {

// What a launch may take as parameters everywhere.
constexpr int kParameterBytes = 4096;
// 4-byte registers that hold what a thread asked for before it uses the first of it.
constexpr int kRegistersInFlight = 32;

// The flat weight is cut into runs of one thread each; a block takes kThreads of them. coefficients holds 2^b G_b of
// each plane before the step and after it, [2, k] or [2, k, channels], then s / (2^n - 1), [2] or [2, channels].
struct Layer {
    StepParams step;
    float* coefficients;
    uint32_t first_block;  // of this layer in the launch
};
constexpr int kLayers = (kParameterBytes - 8) / sizeof(Layer);
struct Batch {
    Layer layers[kLayers];
    int32_t count;
};
static_assert(sizeof(Batch) <= kParameterBytes);

__host__ __device__ int64_t gate_channels(const StepParams& s) {
    return s.before.gates_per_channel ? s.before.channels : 1;
}
__host__ __device__ int64_t scale_channels(const StepParams& s) {
    return s.before.scale_per_channel ? s.before.channels : 1;
}
__host__ __device__ int64_t coefficients_of(const StepParams& s) {
    return s.before.planes * gate_channels(s) + scale_channels(s);
}
int64_t weights_of(const StepParams& s) { return s.before.outer * s.before.channels * s.before.inner; }

// Each computed once, as reconstruct_forward_kernel does: a column of blocks for each layer.
__global__ void __launch_bounds__(kThreads) step_coefficients_kernel(const __grid_constant__ Batch batch) {
    const Layer& layer = batch.layers[blockIdx.y];
    const StepParams& s = layer.step;
    const ReconstructParams& p = s.before;
    const int64_t gates = p.planes * gate_channels(s), each = gates + scale_channels(s);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < 2 * each;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
        const bool after = i >= each;
        const int64_t at = after ? i - each : i;
        if (at < gates) {
            const float logit = (after ? s.gate_logits : p.gate_logits)[at];
            const float temperature = *(after ? s.temperature : p.temperature);
            layer.coefficients[after * gates + at] =
                static_cast<float>(1 << p.bits[at / gate_channels(s)]) * gate(logit, temperature, p.hard_gates);
        } else {
            const float scale = (after ? s.scale : p.scale)[at - gates];
            layer.coefficients[2 * gates + after * scale_channels(s) + at - gates] = step_size(scale, p.n_bits);
        }
    }
}

// How a launch steps its layers: logits of type T; M momenta in float32 or, if N, in float8; W: accesses are wide, and
// the V weights of a thread have one channel.
template <class T, int M, bool N, bool W>
struct Kind {
    using Logit = T;
    using Momentum = std::conditional_t<N, uint8_t, float>;
    static constexpr int kMomenta = M;
    static constexpr bool kNarrow = N;
    static constexpr bool kWhole = W;
    // A warp holds a block of a narrow momentum.
    static constexpr int V = N   ? static_cast<int>(kMomentumBlock) / kWarp
                             : W ? kAccessBytes / static_cast<int>(sizeof(T))
                                 : 1;
    static constexpr int kPlaneRegisters = 2 * V * static_cast<int>(sizeof(T) + M * sizeof(Momentum)) / 4;
    // Planes whose loads a thread issues before it uses the first. Where codes are made of momenta, arithmetic needs
    // the registers, and takes as long as memory.
    static constexpr int kGroup = !N && kPlaneRegisters * 2 <= kRegistersInFlight ? 2 : 1;
    // Blocks that a multiprocessor holds at least.
    static constexpr int kBlocks = N && !W ? 1 : 2;
};

// The logits of one plane and sign, and what moves with them.
template <class K>
struct Row {
    Elements<typename K::Logit, K::V, K::kWhole> logits;
    Elements<typename K::Momentum, K::V, K::kWhole> momenta[K::kMomenta == 0 ? 1 : K::kMomenta];
    float scales[K::kMomenta == 0 ? 1 : K::kMomenta];

    __device__ void load(const StepParams& s, int64_t at, int64_t block, int count) {
        logits.load(s.bit_logits, at, count);
#pragma unroll
        for (int m = 0; m < K::kMomenta; ++m) {
            momenta[m].load(s.momenta[m], at, count);
            if constexpr (K::kNarrow) scales[m] = count > 0 ? s.momentum_scales[m][block] : 0.0f;
        }
    }
};

template <int V>
__device__ void decode(const uint32_t (&words)[V / 4], float scale, bool root, float (&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
        x[v] = from_float8(words[v / 4] >> (v % 4 * 8) & 0xffu) * scale;
        if (root) x[v] *= x[v];
    }
}

// A block is a warp's; x is 0 beyond the end of the weight. Returns the block's scale.
template <int V>
__device__ float encode(const float (&x)[V], uint32_t key, int64_t at, bool root, uint32_t (&words)[V / 4]) {
    float size[V], largest = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        size[v] = root ? Instructions::root(x[v]) : x[v];
        largest = fmaxf(largest, fabsf(size[v]));
    }
    for (int other = kWarp / 2; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
    const float inverse = largest > kSmallestBlock ? kLargestFloat8 / largest : 0.0f;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) words[i] = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const float scaled = size[v] * inverse;
        uint32_t code = to_float8(scaled, mix(key + static_cast<uint32_t>(at) + static_cast<uint32_t>(v)));
        // Divided by the root of 0 a step would be a leap.
        if (root && scaled > 0.0f && code == 0) code = 1;
        words[v / 4] |= code << (v % 4 * 8);
    }
    return largest > kSmallestBlock ? largest / kLargestFloat8 : 0.0f;
}

// Moves and stores the V logits of a row; x becomes what is stored. slope is that of (4) but for P (1 - P), 0 where the
// gate is 0.
template <class K>
__device__ void move(const StepParams& s, Row<K>& row, const float (&slope)[K::V], float rate, int64_t at,
                     int64_t block, int count, float (&x)[K::V]) {
    constexpr int V = K::V, kMomenta = K::kMomenta;
    constexpr uint32_t kFirstKey = kMomentumKeys[0], kSecondKey = kMomentumKeys[1];
    float values[kMomenta == 0 ? 1 : kMomenta][V];
#pragma unroll
    for (int m = 0; m < kMomenta; ++m) {
        if constexpr (K::kNarrow) {
            decode(row.momenta[m].words, row.scales[m], m == 1, values[m]);
        } else {
            row.momenta[m].get(values[m]);
        }
    }
    row.logits.get(x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const float bit = soft_bit<Instructions>(x[v], rate);
        // A logit behind a closed gate may be NaN.
        const float grad = slope[v] == 0.0f ? 0.0f : slope[v] * soft_bit_slope<Instructions>(bit);
        float momenta[2] = {};
#pragma unroll
        for (int m = 0; m < kMomenta; ++m) momenta[m] = values[m][v];
        x[v] = move_logit<kMomenta, Instructions>(s.rule, x[v], grad, momenta);
#pragma unroll
        for (int m = 0; m < kMomenta; ++m) values[m][v] = momenta[m];
        if constexpr (sizeof(typename K::Logit) == 2) {
            x[v] = round_logit(x[v], mix(s.key + static_cast<uint32_t>(at) + static_cast<uint32_t>(v)));
        }
    }
    row.logits.set(x);
    row.logits.store(s.bit_logits, at, count);
#pragma unroll
    for (int m = 0; m < kMomenta; ++m) {
        if constexpr (K::kNarrow) {
            const uint32_t key = s.key ^ (m == 0 ? kFirstKey : kSecondKey);
            const float scale = encode(values[m], key, at, m == 1, row.momenta[m].words);
            if (threadIdx.x % kWarp == 0 && count > 0) s.momentum_scales[m][block] = scale;
        } else {
            row.momenta[m].set(values[m]);
        }
        row.momenta[m].store(s.momenta[m], at, count);
    }
}

template <class T, int M, bool N, bool W>
__global__ void __launch_bounds__(kThreads, Kind<T, M, N, W>::kBlocks)
    step_kernel(const __grid_constant__ Batch batch) {
    using K = Kind<T, M, N, W>;
    constexpr int V = K::V, kGroup = K::kGroup;
    constexpr bool kWhole = K::kWhole;
    int index = 0;
    while (index + 1 < batch.count && blockIdx.x >= batch.layers[index + 1].first_block) ++index;
    const Layer& layer = batch.layers[index];
    const StepParams& s = layer.step;
    const ReconstructParams& p = s.before;
    const int64_t size = p.outer * p.channels * p.inner;
    const int64_t start = (static_cast<int64_t>(blockIdx.x - layer.first_block) * kThreads + threadIdx.x) * V;
    const int count = static_cast<int>(start >= size ? 0 : size - start < V ? size - start : V);
    // All of a warp that shares a block of a momentum are needed.
    if (!K::kNarrow && count == 0) return;

    constexpr int kChannels = kWhole ? 1 : V;
    int64_t channels[kChannels] = {};
    if (p.gates_per_channel || p.scale_per_channel) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) channels[v] = v < count ? (start + v) / p.inner % p.channels : 0;
    }
    const int64_t gate_stride = gate_channels(s);
    const float* powers = layer.coefficients;
    const float* next_powers = powers + p.planes * gate_stride;
    const float* steps = next_powers + p.planes * gate_stride;
    const float* next_steps = steps + scale_channels(s);
    const auto gate_at = [&](const float* values, int plane, int v) {
        return __ldg(values + plane * gate_stride + (p.gates_per_channel ? channels[kWhole ? 0 : v] : 0));
    };
    const auto scale_at = [&](const float* values, int v) {
        return __ldg(values + (p.scale_per_channel ? channels[kWhole ? 0 : v] : 0));
    };

    const float rate = exponent_rate(*p.temperature), next_rate = exponent_rate(*s.temperature);
    float grad[V];
    if (s.weight_dtype == DType::f32) {
        Elements<float, V, kWhole> values;
        values.load(s.grad_weight, start, count);
        values.get(grad);
    } else {
        Elements<__nv_bfloat16, V, kWhole> values;
        values.load(s.grad_weight, start, count);
        values.get(grad);
    }
    const float slope_scale = s.rule.sign * *p.temperature;
#pragma unroll
    for (int v = 0; v < V; ++v) grad[v] *= scale_at(steps, v) * slope_scale;

    const int64_t blocks = (size + kMomentumBlock - 1) / kMomentumBlock, block = start / kMomentumBlock;
    float total[V] = {};
#pragma unroll 1
    for (int first = 0; first < p.planes; first += kGroup) {
        Row<K> rows[kGroup][2];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            if (first + g >= p.planes) break;
#pragma unroll
            for (int sign = 0; sign < 2; ++sign) {
                const int64_t row = sign * p.planes + first + g;
                rows[g][sign].load(s, row * size + start, row * blocks + block, count);
            }
        }
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            if (first + g >= p.planes) break;
            float slope[V], next[V], logits[2][V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float power = gate_at(powers, first + g, v);
                slope[v] = power == 0.0f ? 0.0f : grad[v] * power;
                next[v] = gate_at(next_powers, first + g, v);
            }
#pragma unroll
            for (int sign = 0; sign < 2; ++sign) {
                const int64_t row = sign * p.planes + first + g;
                move<K>(s, rows[g][sign], slope, rate, row * size + start, row * blocks + block, count, logits[sign]);
#pragma unroll
                for (int v = 0; v < V; ++v) slope[v] = -slope[v];
            }
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (next[v] == 0.0f) continue;
                total[v] =
                    Instructions::fma(next[v], digit<Instructions>(logits[0][v], logits[1][v], next_rate), total[v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] *= scale_at(next_steps, v);
    if (s.weight_dtype == DType::f32) {
        Elements<float, V, kWhole> values;
        values.set(total);
        values.store(s.weight, start, count);
    } else {
        Elements<__nv_bfloat16, V, kWhole> values;
        values.set(total);
        values.store(s.weight, start, count);
    }
}

LaunchStatus launch(void (*kernel)(Batch), Batch& batch, int64_t blocks, int64_t most_coefficients, Stream stream) {
    if (batch.count == 0) return {};
    const int64_t columns = (2 * most_coefficients + kThreads - 1) / kThreads;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(columns, 1024)), static_cast<unsigned>(batch.count));
    step_coefficients_kernel<<<grid, kThreads, 0, stream>>>(batch);
    if (const auto status = launched("step_coefficients_kernel"); status.reason) return status;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
    batch.count = 0;
    return launched("step_kernel");
}

bool is_whole(const StepParams& s, int width) {
    const ReconstructParams& p = s.before;
    const int64_t run = p.gates_per_channel || p.scale_per_channel ? p.inner : weights_of(s);
    bool whole = run % width == 0 && aligned(s.bit_logits) && aligned(s.grad_weight) && aligned(s.weight);
    for (int m = 0; m < s.rule.momenta; ++m) whole = whole && aligned(s.momenta[m]);
    return whole;
}

// The layers of one kind, as many in a launch as fit.
template <class K>
LaunchStatus update(const StepParams* layers, int count, float* scratch, Stream stream) {
    constexpr DType kDType = sizeof(typename K::Logit) == 2 ? DType::bf16 : DType::f32;
    constexpr int kWidth = Kind<typename K::Logit, K::kMomenta, K::kNarrow, true>::V;
    const auto kernel = step_kernel<typename K::Logit, K::kMomenta, K::kNarrow, K::kWhole>;
    Batch batch{};
    int64_t blocks = 0, most_coefficients = 0;
    for (int i = 0; i < count; scratch += 2 * coefficients_of(layers[i++])) {
        const StepParams& s = layers[i];
        const bool narrow = s.rule.momenta > 0 && s.momentum_scales[0] != nullptr;
        if (s.before.dtype != kDType || s.rule.momenta != K::kMomenta || narrow != K::kNarrow ||
            is_whole(s, kWidth) != K::kWhole) {
            continue;
        }
        const int64_t own = (weights_of(s) + kThreads * K::V - 1) / (kThreads * K::V);
        if (batch.count == kLayers || blocks + own > INT_MAX) {
            if (const auto status = launch(kernel, batch, blocks, most_coefficients, stream); status.reason) {
                return status;
            }
            blocks = most_coefficients = 0;
        }
        batch.layers[batch.count++] = {s, scratch, static_cast<uint32_t>(blocks)};
        blocks += own;
        most_coefficients = std::max(most_coefficients, coefficients_of(s));
    }
    return launch(kernel, batch, blocks, most_coefficients, stream);
}

template <class T, int M, bool N>
LaunchStatus update_both(const StepParams* layers, int count, float* scratch, Stream stream) {
    if (const auto status = update<Kind<T, M, N, true>>(layers, count, scratch, stream); status.reason) {
        return status;
    }
    return update<Kind<T, M, N, false>>(layers, count, scratch, stream);
}

}  // namespace

LaunchStatus step_update(const StepParams* layers, int count, float* scratch, Stream stream) {
    for (const auto step :
         {update_both<float, 0, false>, update_both<float, 1, false>, update_both<float, 2, false>,
          update_both<float, 1, true>, update_both<float, 2, true>, update_both<__nv_bfloat16, 0, false>,
          update_both<__nv_bfloat16, 1, false>, update_both<__nv_bfloat16, 2, false>,
          update_both<__nv_bfloat16, 1, true>, update_both<__nv_bfloat16, 2, true>}) {
        if (const auto status = step(layers, count, scratch, stream); status.reason) return status;
    }
    return {};
}

int64_t step_scratch_size(const StepParams* layers, int count) {
    int64_t size = 0;
    for (int i = 0; i < count; ++i) size += 2 * coefficients_of(layers[i]);
    return size;
}

}  // namespace csq::cuda
