#include "core/soft_bits.h"
#include "cuda/elements.h"
#include "cuda/reconstruct.h"
#include "cuda/tiling.h"

namespace csq::cuda {
namespace {

// Planes whose loads a thread issues before it uses the first.
constexpr int kGroup = 4;
// Blocks that a multiprocessor holds at least. They and its 65536 registers bound each other; together with the group
// they keep 64 KiB of wide loads in flight and more, several times what hides the latency of memory.
constexpr int kForwardBlocks = 3;
constexpr int kBackwardBlocks = 2;
template <class T>
constexpr int kSumsBlocks = sizeof(T) == 4 ? 3 : 2;
// Blocks that share the channels of one gradient.
constexpr int64_t kMaxFinishRows = 64;

// Whether to read the logits rather than divide the weight by this scale.
__device__ bool too_small(float scale) { return !(fabsf(scale) >= 0x1p-64f); }

__host__ __device__ int gate_rows(const ReconstructParams& p, const Tiling& tiling) {
    return p.gates_per_channel ? tiling.block_rows() : 1;
}
__host__ __device__ int whole_groups(int planes) { return (planes + kGroup - 1) / kGroup * kGroup; }

// Fills powers[whole_groups(planes), gate_rows] with 2^b G_b, each computed once, by one thread of the block; 0 past
// the last plane.
__device__ void fill_powers(const ReconstructParams& p, const Tiling& tiling, int64_t first_row, float* powers) {
    const float temperature = *p.temperature;
    const int rows = gate_rows(p, tiling);
    for (int i = threadIdx.x; i < whole_groups(p.planes) * rows; i += kThreads) {
        const int plane = i / rows;
        powers[i] = 0.0f;
        if (plane >= p.planes) continue;
        const int64_t at = p.gates_per_channel ? plane * p.channels + (first_row + i % rows) % p.channels : plane;
        powers[i] = static_cast<float>(1 << p.bits[plane]) * gate(p.gate_logits[at], temperature, p.hard_gates);
    }
    __syncthreads();
}

// The logits of kGroup planes at one place; those of a plane whose gate is 0 are not read.
template <class T, int V>
struct Group {
    Vector<T, V> positive[kGroup];
    Vector<T, V> negative[kGroup];
    float power[kGroup];

    __device__ Group(const Vector<T, V>* __restrict__ logits, int64_t plane_stride, int64_t sign_stride,
                     const float* powers, int power_stride) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            power[g] = powers[g * power_stride];
            if (power[g] == 0.0f) continue;
            positive[g] = logits[g * plane_stride];
            negative[g] = logits[g * plane_stride + sign_stride];
        }
    }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    reconstruct_forward_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                               Vector<T, V>* __restrict__ weight) {
    extern __shared__ float powers[];
    const Place place(tiling, blockIdx.x, threadIdx.x);
    fill_powers(p, tiling, place.first_row, powers);

    const float rate = exponent_rate(*p.temperature);
    const float step =
        step_size(p.scale[p.scale_per_channel ? (place.first_row + place.block_row) % p.channels : 0], p.n_bits);
    const int gate_stride = gate_rows(p, tiling);
    const float* row_powers = powers + (p.gates_per_channel ? place.block_row : 0);
    const int64_t plane_stride = tiling.rows * tiling.vectors;
    const int64_t sign_stride = p.planes * plane_stride;
    int64_t at = place.at;
#pragma unroll 1
    for (int i = 0; i < place.steps; ++i, at += tiling.stride()) {
        const auto* __restrict__ logits = static_cast<const Vector<T, V>*>(p.bit_logits) + at;
        float total[V] = {};
        for (int plane = 0; plane < p.planes; plane += kGroup, logits += kGroup * plane_stride) {
            const Group<T, V> group(logits, plane_stride, sign_stride, row_powers + plane * gate_stride, gate_stride);
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
                if (group.power[g] == 0.0f) continue;
                float positive[V], negative[V];
                group.positive[g].get(positive);
                group.negative[g].get(negative);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float difference = digit<Instructions>(positive[v], negative[v], rate);
                    total[v] = Instructions::fma(group.power[g], difference, total[v]);
                }
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] *= step;
        weight[at] = Vector<T, V>::of(total);
    }
}

// partial[planes, summed rows, column blocks] of sums[planes, kThreads], which the threads of a block have filled: a
// sum per plane and row of the block, each made by as many neighbours as share a row and a warp.
__device__ void sum_rows(const Tiling& tiling, const Place& place, int planes, const double* sums, double* partial) {
    __syncthreads();
    const int group = min(tiling.lanes, kWarp);
    const int rows = tiling.block_rows();
    for (int first = 0; first < planes * rows; first += kThreads / group) {
        const int i = first + static_cast<int>(threadIdx.x) / group;
        const int lane = static_cast<int>(threadIdx.x) % group;
        double sum = 0.0;
        if (i < planes * rows) {
            for (int j = lane; j < tiling.lanes; j += group) sum += sums[i * tiling.lanes + j];
        }
        for (int other = group / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        const int64_t block_row = i % rows;
        const bool exists = i < planes * rows && place.first_row % tiling.slab + block_row < tiling.slab;
        if (lane == 0 && exists) {
            const int64_t row = i / rows * tiling.summed_rows() + place.summed_row + block_row;
            partial[row * tiling.column_blocks + place.column_block] = sum;
        }
    }
}

// Logit gradients if kWithLogits, and T = sum of D (P - N) per plane, summed row and column block, from which (5) and
// (6) follow. A thread adds the terms of one access in fp32; everything from there on is added in fp64, in fixed order.
template <class T, int V, class D, bool kWithLogits>
__device__ __forceinline__ void backward_block(const ReconstructParams& p, const Tiling& tiling,
                                               const D* __restrict__ grad_weight, Vector<T, V>* __restrict__ grad_bits,
                                               double* __restrict__ partial) {
    extern __shared__ double sums[];  // [planes, kThreads]: each thread adds to its own
    for (int plane = 0; plane < p.planes; ++plane) sums[plane * kThreads + threadIdx.x] = 0.0;
    float* powers = reinterpret_cast<float*>(sums + p.planes * kThreads);
    const int gate_stride = gate_rows(p, tiling);
    const Place place(tiling, blockIdx.x, threadIdx.x);
    fill_powers(p, tiling, place.first_row, powers);

    const float rate = exponent_rate(*p.temperature);
    const float step =
        step_size(p.scale[p.scale_per_channel ? (place.first_row + place.block_row) % p.channels : 0], p.n_bits);
    const float slope_scale = step * *p.temperature;
    const float* row_powers = powers + (p.gates_per_channel ? place.block_row : 0);
    const int64_t plane_stride = tiling.rows * tiling.vectors;
    const int64_t sign_stride = p.planes * plane_stride;
    int64_t start = place.at;
#pragma unroll 1
    for (int i = 0; i < place.steps; ++i, start += tiling.stride()) {
        Elements<D, V, true> packed;
        packed.load(grad_weight, start * V, V);
        float grad[V];
        packed.get(grad);
        int64_t at = start;
        for (int first = 0; first < p.planes; first += kGroup, at += kGroup * plane_stride) {
            const auto* __restrict__ logits = static_cast<const Vector<T, V>*>(p.bit_logits) + at;
            const Group<T, V> group(logits, plane_stride, sign_stride, row_powers + first * gate_stride, gate_stride);
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
                if (first + g >= p.planes) break;
                float positive[V] = {};
                float negative[V] = {};
                if (group.power[g] != 0.0f) {
                    const float factor = slope_scale * group.power[g];
                    float sum = 0.0f;
                    group.positive[g].get(positive);
                    group.negative[g].get(negative);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        if constexpr (!kWithLogits) {
                            sum += grad[v] * digit<Instructions>(positive[v], negative[v], rate);
                            continue;
                        }
                        const float bit_p = soft_bit<Instructions>(positive[v], rate);
                        const float bit_q = soft_bit<Instructions>(negative[v], rate);
                        positive[v] = grad[v] * factor * soft_bit_slope<Instructions>(bit_p);
                        negative[v] = grad[v] * -factor * soft_bit_slope<Instructions>(bit_q);
                        sum += grad[v] * (bit_p - bit_q);
                    }
                    sums[(first + g) * kThreads + threadIdx.x] += static_cast<double>(sum);
                }
                if constexpr (kWithLogits) {
                    grad_bits[at + g * plane_stride] = Vector<T, V>::of(positive);
                    grad_bits[at + g * plane_stride + sign_stride] = Vector<T, V>::of(negative);
                }
            }
        }
    }
    sum_rows(tiling, place, p.planes, sums, partial);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    reconstruct_backward_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                                const T* __restrict__ grad_weight, Vector<T, V>* __restrict__ grad_bits,
                                double* __restrict__ partial) {
    backward_block<T, V, T, true>(p, tiling, grad_weight, grad_bits, partial);
}
// The sums alone, for a gradient in the dtype of the logits or in fp32.
template <class T, int V, bool kFloatGradient>
__global__ void __launch_bounds__(kThreads, kSumsBlocks<T>)
    reconstruct_sums_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                            const void* __restrict__ grad_weight, double* __restrict__ partial) {
    using D = std::conditional_t<kFloatGradient, float, T>;
    backward_block<T, V, D, false>(p, tiling, static_cast<const D*>(grad_weight), nullptr, partial);
}

// Sums of D W per summed row and column block, from which (6) follows, for a weight and a gradient in fp32; where the
// scale is too small to divide by, of D W (2^n - 1) / s, from the logits. Gates are hard.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    reconstruct_products_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                                const float* __restrict__ grad_weight, const float* __restrict__ weight,
                                double* __restrict__ partial) {
    __shared__ double sums[kThreads];
    double own = 0.0;
    const Place place(tiling, blockIdx.x, threadIdx.x);
    const int64_t channel = (place.first_row + place.block_row) % p.channels;
    const bool small = too_small(p.scale[p.scale_per_channel ? channel : 0]);
    const float rate = exponent_rate(*p.temperature);
    const int64_t plane_stride = tiling.rows * p.inner;
    int64_t at = place.at * V;
#pragma unroll 1
    for (int i = 0; i < place.steps; ++i, at += tiling.stride() * V) {
        Elements<float, V, true> packed_grad, packed_weight;
        packed_grad.load(grad_weight, at, V);
        packed_weight.load(weight, at, V);
        float grad[V], value[V];
        packed_grad.get(grad);
        packed_weight.get(value);
        if (small) {
#pragma unroll
            for (int v = 0; v < V; ++v) value[v] = 0.0f;
            const T* logits = static_cast<const T*>(p.bit_logits) + at;
#pragma unroll 1
            for (int b = 0; b < p.planes; ++b, logits += plane_stride) {
                if (!(p.gate_logits[p.gates_per_channel ? b * p.channels + channel : b] > 0.0f)) continue;
                const T* negative = logits + p.planes * plane_stride;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float difference =
                        digit<Instructions>(static_cast<float>(logits[v]), static_cast<float>(negative[v]), rate);
                    value[v] = Instructions::fma(static_cast<float>(1 << p.bits[b]), difference, value[v]);
                }
            }
        }
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) sum += grad[v] * value[v];
        own += static_cast<double>(sum);
    }
    sums[threadIdx.x] = own;
    sum_rows(tiling, place, 1, sums, partial);
}

// The sum over the block's threads, in fixed order, for all of them.
__device__ double block_sum(double value) {
    __shared__ double values[kThreads];
    values[threadIdx.x] = value;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    }
    __syncthreads();
    return values[0];
}

// Threads that add up one total: a warp where few partial sums make it, as with a channel per row, else a block.
int total_threads(const ReconstructParams& p, const Tiling& tiling) {
    return tiling.summed_rows() / p.channels * tiling.column_blocks <= kThreads ? kWarp : kThreads;
}

// totals[planes, channels] = T summed over column blocks and over the summed rows of a channel, by `team` threads each.
__global__ void __launch_bounds__(kThreads)
    reconstruct_totals_kernel(int planes, int64_t channels, const __grid_constant__ Tiling tiling, int team,
                              const double* __restrict__ partial, double* __restrict__ totals) {
    // A grid has fewer than 2^31 blocks and a channel fewer sums than that: divided in 64 bits, they took the most
    // time.
    const uint32_t total = blockIdx.x * (kThreads / team) + threadIdx.x / team;
    if (total >= planes * channels) return;
    const uint32_t plane = total / static_cast<uint32_t>(channels), columns = tiling.column_blocks;
    const int64_t first = plane * tiling.summed_rows() + total % static_cast<uint32_t>(channels);
    const uint32_t count = static_cast<uint32_t>(tiling.summed_rows() / channels) * columns;
    double sum = 0.0;
    for (uint32_t i = threadIdx.x % team; i < count; i += team) {
        const uint32_t row = i / columns;
        sum += partial[(first + row * channels) * columns + (i - row * columns)];
    }
    if (team == kThreads) {
        sum = block_sum(sum);
    } else {
        for (int other = kWarp / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    }
    if (threadIdx.x % team == 0) totals[total] = sum;
}

// Equation (5) in the first p.planes columns of blocks, a plane each; equation (6) in the last. Where every channel has
// a gradient of its own, the blocks of a column share the channels; else its first block adds them up. With kOfWeight
// there is (6) alone, and the totals are those of reconstruct_products_kernel.
template <bool kOfWeight>
__global__ void __launch_bounds__(kThreads, 1)
    reconstruct_finish_kernel(const __grid_constant__ ReconstructParams p, const double* __restrict__ totals,
                              float* __restrict__ grad_gate_logits, float* __restrict__ grad_scale) {
    const int plane = kOfWeight ? p.planes : blockIdx.x;
    const bool is_scale = plane == p.planes;
    const bool per_channel = is_scale ? p.scale_per_channel : p.gates_per_channel;
    if (!per_channel && blockIdx.y > 0) return;
    const auto gate_at = [&](int b, int64_t channel) {
        const int64_t at = p.gates_per_channel ? b * p.channels + channel : b;
        return precise_gate(p.gate_logits[at], *p.temperature, p.hard_gates);
    };
    // Those of the layer are computed once, not for each channel again.
    __shared__ double layer_gates[kMaxPlanes];
    if (!kOfWeight && !p.gates_per_channel) {
        if (threadIdx.x < p.planes) layer_gates[threadIdx.x] = gate_at(threadIdx.x, 0);
        __syncthreads();
    }
    const double temperature = static_cast<double>(*p.temperature);
    const double unit = 1.0 / static_cast<double>((1 << p.n_bits) - 1);
    float* gradient = is_scale ? grad_scale : grad_gate_logits + plane * (per_channel ? p.channels : 1);
    const int64_t stride = static_cast<int64_t>(per_channel ? gridDim.y : 1) * kThreads;
    double sum = 0.0;
    for (int64_t channel = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; channel < p.channels;
         channel += stride) {
        double value = 0.0;
        if constexpr (kOfWeight) {
            const float scale = p.scale[p.scale_per_channel ? channel : 0];
            value = totals[channel] * (too_small(scale) ? unit : 1.0 / static_cast<double>(scale));
        } else if (is_scale) {
#pragma unroll 4
            for (int b = 0; b < p.planes; ++b) {
                const double gate = p.gates_per_channel ? gate_at(b, channel) : layer_gates[b];
                value += static_cast<double>(1 << p.bits[b]) * gate * totals[b * p.channels + channel];
            }
            value *= unit;
        } else if (!p.hard_gates) {
            const double gate = p.gates_per_channel ? gate_at(plane, channel) : layer_gates[plane];
            const double scale = static_cast<double>(p.scale[p.scale_per_channel ? channel : 0]);
            const double slope = temperature * gate * (1.0 - gate) * static_cast<double>(1 << p.bits[plane]) * unit;
            value = slope * scale * totals[plane * p.channels + channel];
        }
        if (per_channel) gradient[channel] = static_cast<float>(value);
        sum += value;
    }
    if (per_channel) return;
    sum = block_sum(sum);
    if (threadIdx.x == 0) *gradient = static_cast<float>(sum);
}

template <class T, int V>
LaunchStatus launch_forward(const ReconstructParams& p, void* weight, Stream stream) {
    const Tiling tiling(p.outer, p.channels, p.inner, V);
    const size_t shared = sizeof(float) * whole_groups(p.planes) * gate_rows(p, tiling);
    reconstruct_forward_kernel<T, V>
        <<<tiling.blocks(), kThreads, shared, stream>>>(p, tiling, static_cast<Vector<T, V>*>(weight));
    return launched("reconstruct_forward_kernel");
}

// totals[planes, channels] of partial[planes, summed rows, column blocks].
LaunchStatus launch_totals(const ReconstructParams& p, const Tiling& tiling, int planes, const double* partial,
                           double* totals, Stream stream) {
    if (planes * p.channels > int64_t{1} << 31) return {"reconstruct_totals_kernel", "more than 2^31 sums"};
    const int team = total_threads(p, tiling);
    const int64_t blocks = (planes * p.channels + kThreads / team - 1) / (kThreads / team);
    reconstruct_totals_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(planes, p.channels, tiling, team,
                                                                                      partial, totals);
    return launched("reconstruct_totals_kernel");
}

template <bool kOfWeight>
LaunchStatus launch_finish(const ReconstructParams& p, const double* totals, float* grad_gate_logits, float* grad_scale,
                           Stream stream) {
    const bool any_per_channel = p.gates_per_channel || p.scale_per_channel;
    const int64_t rows = any_per_channel ? std::min((p.channels + kThreads - 1) / kThreads, kMaxFinishRows) : 1;
    const dim3 grid(kOfWeight ? 1u : static_cast<unsigned>(p.planes + 1), static_cast<unsigned>(rows));
    reconstruct_finish_kernel<kOfWeight><<<grid, kThreads, 0, stream>>>(p, totals, grad_gate_logits, grad_scale);
    return launched("reconstruct_finish_kernel");
}

template <class T, int V, class D>
LaunchStatus launch_backward(const ReconstructParams& p, const ReconstructGradients& g, double* scratch,
                             Stream stream) {
    const Tiling tiling(p.outer, p.channels, p.inner, V);
    // At most 48 KiB, which every device grants unasked.
    const size_t shared =
        sizeof(double) * p.planes * kThreads + sizeof(float) * whole_groups(p.planes) * gate_rows(p, tiling);
    double* totals = scratch;
    double* partial = scratch + p.planes * p.channels;
    if (p.planes > 0) {
        const auto* grad_weight = static_cast<const D*>(g.grad_weight);
        if (g.grad_bit_logits == nullptr) {
            reconstruct_sums_kernel<T, V, std::is_same_v<D, float>>
                <<<tiling.blocks(), kThreads, shared, stream>>>(p, tiling, grad_weight, partial);
            if (const auto status = launched("reconstruct_sums_kernel"); status.reason) return status;
        } else if constexpr (std::is_same_v<T, D>) {
            reconstruct_backward_kernel<T, V><<<tiling.blocks(), kThreads, shared, stream>>>(
                p, tiling, grad_weight, static_cast<Vector<T, V>*>(g.grad_bit_logits), partial);
            if (const auto status = launched("reconstruct_backward_kernel"); status.reason) return status;
        }
        if (const auto status = launch_totals(p, tiling, p.planes, partial, totals, stream); status.reason) {
            return status;
        }
    }
    return launch_finish<false>(p, totals, g.grad_gate_logits, g.grad_scale, stream);
}

template <class T, int V>
LaunchStatus launch_scale_gradient(const ReconstructParams& p, const float* grad_weight, const float* weight,
                                   float* grad_scale, double* scratch, Stream stream) {
    const Tiling tiling(p.outer, p.channels, p.inner, V);
    double* totals = scratch;
    double* partial = scratch + p.channels;
    reconstruct_products_kernel<T, V>
        <<<tiling.blocks(), kThreads, 0, stream>>>(p, tiling, grad_weight, weight, partial);
    if (const auto status = launched("reconstruct_products_kernel"); status.reason) return status;
    if (const auto status = launch_totals(p, tiling, 1, partial, totals, stream); status.reason) return status;
    return launch_finish<true>(p, totals, nullptr, grad_scale, stream);
}

// Accesses of 16 bytes where rows and arrays allow them, else of one element.
template <class T, class... Arrays>
bool wide(const ReconstructParams& p, Arrays... arrays) {
    return p.inner % (kAccessBytes / sizeof(T)) == 0 && aligned(p.bit_logits) && (aligned(arrays) && ...);
}

template <class T>
LaunchStatus forward(const ReconstructParams& p, void* weight, Stream stream) {
    return wide<T>(p, weight) ? launch_forward<T, kAccessBytes / sizeof(T)>(p, weight, stream)
                              : launch_forward<T, 1>(p, weight, stream);
}

template <class T, class D = T>
LaunchStatus backward(const ReconstructParams& p, const ReconstructGradients& g, double* scratch, Stream stream) {
    return wide<T>(p, g.grad_weight, g.grad_bit_logits)
               ? launch_backward<T, kAccessBytes / sizeof(T), D>(p, g, scratch, stream)
               : launch_backward<T, 1, D>(p, g, scratch, stream);
}

template <class T>
LaunchStatus scale_gradient(const ReconstructParams& p, const float* grad_weight, const float* weight,
                            float* grad_scale, double* scratch, Stream stream) {
    return p.inner % 4 == 0 && aligned(grad_weight) && aligned(weight)
               ? launch_scale_gradient<T, 4>(p, grad_weight, weight, grad_scale, scratch, stream)
               : launch_scale_gradient<T, 1>(p, grad_weight, weight, grad_scale, scratch, stream);
}

}  // namespace

LaunchStatus reconstruct_forward(const ReconstructParams& params, void* weight, Stream stream) {
    switch (params.dtype) {
        case DType::bf16:
            return forward<__nv_bfloat16>(params, weight, stream);
        case DType::f16:
            return forward<__half>(params, weight, stream);
        default:
            return forward<float>(params, weight, stream);
    }
}

LaunchStatus reconstruct_backward(const ReconstructParams& params, const ReconstructGradients& gradients,
                                  double* scratch, Stream stream) {
    switch (params.dtype) {
        case DType::bf16:
            if (gradients.grad_weight_dtype == DType::f32) {
                return backward<__nv_bfloat16, float>(params, gradients, scratch, stream);
            }
            return backward<__nv_bfloat16>(params, gradients, scratch, stream);
        case DType::f16:
            return backward<__half>(params, gradients, scratch, stream);
        default:
            return backward<float>(params, gradients, scratch, stream);
    }
}

LaunchStatus reconstruct_scale_gradient(const ReconstructParams& params, const float* grad_weight, const float* weight,
                                        float* grad_scale, double* scratch, Stream stream) {
    const auto compute = params.dtype == DType::bf16 ? scale_gradient<__nv_bfloat16> : scale_gradient<float>;
    return compute(params, grad_weight, weight, grad_scale, scratch, stream);
}

int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes) {
    int64_t partials = 0;
    for (const int width : {1, 4, 8}) {
        if (inner % width == 0) partials = std::max(partials, Tiling(outer, channels, inner, width).partials(planes));
    }
    return planes * channels + partials;
}

}  // namespace csq::cuda
