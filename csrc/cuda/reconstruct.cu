#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/reconstruct.h"

namespace csq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;
constexpr int kMaxSteps = 8;
// Blocks that fill a large device several times over: only beyond them does a thread take more than one step.
constexpr int64_t kEnoughBlocks = 2048;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// csq::sigmoid with the reciprocal instruction for the division: 1 ulp, exact at 1, and denormal results become 0.
__device__ float fast_sigmoid(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + expf(-x)));
    return y;
}

// V elements that move in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
    T lane[V];
};

// The weight as a matrix of outer * channels rows, each `vectors` accesses long. A block owns kThreads / lanes rows and
// lanes * steps vectors of each. Everything follows from the shape, so that the order of sums does.
struct Tiling {
    int64_t rows;
    int64_t vectors;
    uint32_t column_blocks;
    int32_t lanes;  // threads of a row, a power of two
    int32_t steps;

    Tiling(int64_t outer, int64_t channels, int64_t inner, int width)
        : rows(outer * channels), vectors(inner / width), lanes(1) {
        while (lanes < kThreads && lanes < vectors) lanes *= 2;
        // Rather several rows in a block than more than an eighth of its threads without work.
        while (lanes > kWarp && rows > block_rows() && tiles() * lanes * 8 > vectors * 9) lanes /= 2;
        const int64_t blocks = row_blocks() * tiles();
        steps = static_cast<int32_t>(std::min(tiles(), std::clamp<int64_t>(blocks / kEnoughBlocks, 1, kMaxSteps)));
        column_blocks = static_cast<uint32_t>((tiles() + steps - 1) / steps);
    }

    __host__ __device__ int block_rows() const { return kThreads / lanes; }
    int64_t tiles() const { return (vectors + lanes - 1) / lanes; }
    int64_t row_blocks() const { return (rows + block_rows() - 1) / block_rows(); }
    unsigned blocks() const { return static_cast<unsigned>(row_blocks() * column_blocks); }
    int64_t partials(int planes) const { return planes * rows * column_blocks; }
};

// What of the matrix a thread works on.
struct Place {
    int64_t first_row;  // of the block
    int64_t row;
    int64_t column_block;
    int64_t column;  // of the first step, in vectors

    __device__ explicit Place(const Tiling& tiling) {
        first_row = static_cast<int64_t>(blockIdx.x / tiling.column_blocks) * tiling.block_rows();
        row = first_row + threadIdx.x / tiling.lanes;
        column_block = blockIdx.x % tiling.column_blocks;
        column = column_block * tiling.steps * tiling.lanes + threadIdx.x % tiling.lanes;
    }
};

__host__ __device__ int gate_rows(const ReconstructParams& p, const Tiling& tiling) {
    return p.gates_per_channel ? tiling.block_rows() : 1;
}

// Fills powers[planes, gate_rows] with 2^b G_b, each computed once, by one thread of the block.
__device__ void fill_powers(const ReconstructParams& p, const Tiling& tiling, int64_t first_row, float* powers) {
    const float temperature = *p.temperature;
    const int rows = gate_rows(p, tiling);
    for (int i = threadIdx.x; i < p.planes * rows; i += kThreads) {
        const int plane = i / rows;
        const int64_t at = p.gates_per_channel ? plane * p.channels + (first_row + i % rows) % p.channels : plane;
        powers[i] = static_cast<float>(1 << p.bits[plane]) * gate(p.gate_logits[at], temperature, p.hard_gates);
    }
    __syncthreads();
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    reconstruct_forward_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                               Vector<T, V>* __restrict__ weight) {
    extern __shared__ float powers[];
    const Place place(tiling);
    fill_powers(p, tiling, place.first_row, powers);
    if (place.row >= tiling.rows) return;

    const float temperature = *p.temperature;
    const float step = step_size(p.scale[p.scale_per_channel ? place.row % p.channels : 0], p.n_bits);
    const int gate_stride = gate_rows(p, tiling);
    const float* row_powers = powers + (p.gates_per_channel ? place.row - place.first_row : 0);
    const int64_t plane_stride = tiling.rows * tiling.vectors;
    int64_t column = place.column;
    for (int i = 0; i < tiling.steps && column < tiling.vectors; ++i, column += tiling.lanes) {
        const int64_t at = place.row * tiling.vectors + column;
        const auto* __restrict__ positive = static_cast<const Vector<T, V>*>(p.bit_logits) + at;
        const auto* __restrict__ negative = positive + p.planes * plane_stride;
        float total[V] = {};
        for (int plane = 0; plane < p.planes; ++plane, positive += plane_stride, negative += plane_stride) {
            const float power = row_powers[plane * gate_stride];
            if (power == 0.0f) continue;
            const Vector<T, V> a = *positive;
            const Vector<T, V> b = *negative;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float digit =
                    fast_sigmoid(temperature * to_float(a.lane[v])) - fast_sigmoid(temperature * to_float(b.lane[v]));
                total[v] += power * digit;
            }
        }
        Vector<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.lane[v] = from_float<T>(step * total[v]);
        weight[at] = result;
    }
}

// Logit gradients, and T = sum of D (P - N) per plane, row and column block, from which (5) and (6) follow.
// A thread adds the terms of one access in fp32; everything from there on is added in fp64, in fixed order.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    reconstruct_backward_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                                const Vector<T, V>* __restrict__ grad_weight, Vector<T, V>* __restrict__ grad_bits,
                                double* __restrict__ partial) {
    // [planes, slots]; a slot belongs to one thread, the first of each warp, or of each row where a warp holds several.
    extern __shared__ double sums[];
    const int group = min(tiling.lanes, kWarp);
    const int slots = kThreads / group;
    const int slot = threadIdx.x / group;
    const bool leads = threadIdx.x % group == 0;
    for (int i = threadIdx.x; i < p.planes * slots; i += kThreads) sums[i] = 0.0;
    float* powers = reinterpret_cast<float*>(sums + p.planes * slots);
    const int gate_stride = gate_rows(p, tiling);
    const Place place(tiling);
    fill_powers(p, tiling, place.first_row, powers);

    const float temperature = *p.temperature;
    const float step = step_size(p.scale[p.scale_per_channel ? place.row % p.channels : 0], p.n_bits);
    const float* row_powers = powers + (p.gates_per_channel ? place.row - place.first_row : 0);
    const int64_t plane_stride = tiling.rows * tiling.vectors;
    const int64_t sign_stride = p.planes * plane_stride;
    int64_t column = place.column;
    for (int i = 0; i < tiling.steps; ++i, column += tiling.lanes) {
        // Every thread stays, for the shuffles.
        const bool inside = place.row < tiling.rows && column < tiling.vectors;
        int64_t at = place.row * tiling.vectors + column;
        Vector<T, V> grad = {};
        if (inside) grad = grad_weight[at];
        const auto* __restrict__ logits = static_cast<const Vector<T, V>*>(p.bit_logits);
        for (int plane = 0; plane < p.planes; ++plane, at += plane_stride) {
            const float power = row_powers[plane * gate_stride];
            float sum = 0.0f;
            if (inside) {
                Vector<T, V> grad_p = {};
                Vector<T, V> grad_q = {};
                if (power != 0.0f) {
                    const Vector<T, V> a = logits[at];
                    const Vector<T, V> b = logits[at + sign_stride];
                    const float factor = step * power * temperature;
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        const float d = to_float(grad.lane[v]);
                        const float positive = fast_sigmoid(temperature * to_float(a.lane[v]));
                        const float negative = fast_sigmoid(temperature * to_float(b.lane[v]));
                        grad_p.lane[v] = from_float<T>(d * factor * positive * (1.0f - positive));
                        grad_q.lane[v] = from_float<T>(d * factor * -negative * (1.0f - negative));
                        sum += d * (positive - negative);
                    }
                }
                grad_bits[at] = grad_p;
                grad_bits[at + sign_stride] = grad_q;
            }
            double total = sum;
            for (int lane = group / 2; lane > 0; lane /= 2) total += __shfl_xor_sync(~0u, total, lane);
            if (leads) sums[plane * slots + slot] += total;
        }
    }
    __syncthreads();
    const int rows = tiling.block_rows();
    const int row_slots = slots / rows;
    for (int i = threadIdx.x; i < p.planes * rows; i += kThreads) {
        const int plane = i / rows;
        const int64_t row = place.first_row + i % rows;
        if (row >= tiling.rows) continue;
        const double* first = sums + plane * slots + i % rows * row_slots;
        double sum = 0.0;
        for (int j = 0; j < row_slots; ++j) sum += first[j];
        partial[(plane * tiling.rows + row) * tiling.column_blocks + place.column_block] = sum;
    }
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

// totals[planes, channels] = T summed over column blocks and over the outer rows of a channel. A block makes one.
__global__ void __launch_bounds__(kThreads)
    reconstruct_totals_kernel(const __grid_constant__ ReconstructParams p, const __grid_constant__ Tiling tiling,
                              const double* __restrict__ partial, double* __restrict__ totals) {
    const int64_t channel = blockIdx.x;
    const int64_t plane = blockIdx.y;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < p.outer * tiling.column_blocks; i += kThreads) {
        const int64_t row = plane * tiling.rows + i / tiling.column_blocks * p.channels + channel;
        sum += partial[row * tiling.column_blocks + i % tiling.column_blocks];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) totals[plane * p.channels + channel] = sum;
}

// Equation (5) in the first p.planes blocks, a plane each; equation (6) in the last.
__global__ void __launch_bounds__(kThreads)
    reconstruct_finish_kernel(const __grid_constant__ ReconstructParams p, const double* __restrict__ totals,
                              float* __restrict__ grad_gate_logits, float* __restrict__ grad_scale) {
    const double temperature = static_cast<double>(*p.temperature);
    const double unit = 1.0 / static_cast<double>((1 << p.n_bits) - 1);
    const auto gate_at = [&](int plane, int64_t channel) {
        const int64_t at = p.gates_per_channel ? plane * p.channels + channel : plane;
        return precise_gate(p.gate_logits[at], *p.temperature, p.hard_gates);
    };
    const int plane = blockIdx.x;
    const bool is_scale = plane == p.planes;
    const bool per_channel = is_scale ? p.scale_per_channel : p.gates_per_channel;
    float* gradient = is_scale ? grad_scale : grad_gate_logits + plane * (per_channel ? p.channels : 1);
    double sum = 0.0;
    for (int64_t channel = threadIdx.x; channel < p.channels; channel += kThreads) {
        double value = 0.0;
        if (is_scale) {
            for (int b = 0; b < p.planes; ++b) {
                value += static_cast<double>(1 << p.bits[b]) * gate_at(b, channel) * totals[b * p.channels + channel];
            }
            value *= unit;
        } else if (!p.hard_gates) {
            const double gate = gate_at(plane, channel);
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

LaunchStatus launched(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? LaunchStatus{} : LaunchStatus{kernel, cudaGetErrorString(error)};
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0; }

template <class T, int V>
LaunchStatus launch_forward(const ReconstructParams& p, void* weight, Stream stream) {
    const Tiling tiling(p.outer, p.channels, p.inner, V);
    const size_t shared = sizeof(float) * p.planes * gate_rows(p, tiling);
    reconstruct_forward_kernel<T, V>
        <<<tiling.blocks(), kThreads, shared, stream>>>(p, tiling, static_cast<Vector<T, V>*>(weight));
    return launched("reconstruct_forward_kernel");
}

template <class T, int V>
LaunchStatus launch_backward(const ReconstructParams& p, const ReconstructGradients& g, double* scratch,
                             Stream stream) {
    const Tiling tiling(p.outer, p.channels, p.inner, V);
    const int slots = kThreads / std::min(tiling.lanes, kWarp);
    // At most 48 KiB, which every device grants unasked.
    const size_t shared = p.planes * (sizeof(double) * slots + sizeof(float) * gate_rows(p, tiling));
    double* totals = scratch;
    double* partial = scratch + p.planes * p.channels;
    if (p.planes > 0) {
        reconstruct_backward_kernel<T, V>
            <<<tiling.blocks(), kThreads, shared, stream>>>(p, tiling, static_cast<const Vector<T, V>*>(g.grad_weight),
                                                            static_cast<Vector<T, V>*>(g.grad_bit_logits), partial);
        if (const auto status = launched("reconstruct_backward_kernel"); status.reason) return status;
        const dim3 grid(static_cast<unsigned>(p.channels), static_cast<unsigned>(p.planes));
        reconstruct_totals_kernel<<<grid, kThreads, 0, stream>>>(p, tiling, partial, totals);
        if (const auto status = launched("reconstruct_totals_kernel"); status.reason) return status;
    }
    reconstruct_finish_kernel<<<p.planes + 1, kThreads, 0, stream>>>(p, totals, g.grad_gate_logits, g.grad_scale);
    return launched("reconstruct_finish_kernel");
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

template <class T>
LaunchStatus backward(const ReconstructParams& p, const ReconstructGradients& g, double* scratch, Stream stream) {
    return wide<T>(p, g.grad_weight, g.grad_bit_logits)
               ? launch_backward<T, kAccessBytes / sizeof(T)>(p, g, scratch, stream)
               : launch_backward<T, 1>(p, g, scratch, stream);
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
            return backward<__nv_bfloat16>(params, gradients, scratch, stream);
        case DType::f16:
            return backward<__half>(params, gradients, scratch, stream);
        default:
            return backward<float>(params, gradients, scratch, stream);
    }
}

int64_t reconstruct_scratch_size(int64_t outer, int64_t channels, int64_t inner, int planes) {
    int64_t partials = 0;
    for (const int width : {1, 4, 8}) {
        if (inner % width == 0) partials = std::max(partials, Tiling(outer, channels, inner, width).partials(planes));
    }
    return planes * channels + partials;
}

}  // namespace csq::cuda
