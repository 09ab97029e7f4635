#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/bitserial.h"

namespace csq::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kFloatRows = 4;
// One more than the rows of a tile, so that a column of sums is spread over the banks.
constexpr int kSumStride = kWarpRows + 1;

// Tiles that a warp has on their way, one of which it works on. A block then waits for 28, 32, 36, 48, 40, 48, 56, 64
// KiB with 1 to 8 planes: 3.35 TB/s for 0.7 us, what an H100 needs, are 18 KiB for each of its 132 multiprocessors.
__host__ __device__ constexpr int stages(int planes) { return planes == 1 ? 8 : planes == 2 ? 5 : planes <= 4 ? 4 : 3; }
__host__ __device__ constexpr int ring_bytes(int planes) { return kWarps * stages(planes) * planes * kPlaneTileBytes; }
static_assert(ring_bytes(1) >= kWarps * kPassRows * kSumStride * 4, "the sums of all warps lie where the planes were");

__device__ void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ void wait_for_all_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The tiles of a row of tiles that one warp multiplies: every kWarps-th. Each lane copies and reads what is its own, so
// that no other has to wait for it.
template <int K>
class Tiles {
public:
    __device__ Tiles(const BitserialLinear& p, const PlaneGroup& group, uint4* ring)
        : ahead_(threadIdx.x / kWarp),
          blocks_(static_cast<int>(p.blocks)),
          stride_(static_cast<int64_t>(p.planes) * kPlaneTileBytes * kWarps),
          source_(p.tiles + (blockIdx.x * p.blocks + ahead_) * p.planes * kPlaneTileBytes +
                  group.first * kPlaneTileBytes + threadIdx.x % kWarp * 16),
          ring_(ring + ahead_ * stages(K) * K * kWarp + threadIdx.x % kWarp) {
        for (int i = 0; i < stages(K) - 1; ++i) fetch(i);
    }

    // The words of the next tile: that in the block of columns of the warp's number, then every kWarps-th.
    __device__ void next(uint32_t (&words)[kLaneRows * K]) {
        wait_for_all_copies_but<stages(K) - 2>();
#pragma unroll
        for (int v = 0; v < K; ++v) {
            const uint4 four = ring_[(slot_ * K + v) * kWarp];
            words[4 * v] = four.x, words[4 * v + 1] = four.y, words[4 * v + 2] = four.z, words[4 * v + 3] = four.w;
        }
        const int free = slot_ == 0 ? stages(K) - 1 : slot_ - 1;
        fetch(free);
        slot_ = slot_ == stages(K) - 1 ? 0 : slot_ + 1;
    }

private:
    __device__ void fetch(int slot) {
        if (ahead_ < blocks_) {
#pragma unroll
            for (int v = 0; v < K; ++v) copy_async(ring_ + (slot * K + v) * kWarp, source_ + v * kPlaneTileBytes);
        }
        commit_copies();
        ahead_ += kWarps;
        source_ += stride_;
    }

    int slot_ = 0;
    int ahead_;  // block of columns of the tile that is fetched next
    int blocks_;
    int64_t stride_;  // bytes from a tile of the warp to its next
    const uint8_t* source_;
    uint4* ring_;
};

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

__device__ void store(void* output, int64_t at, DType dtype, float value) {
    switch (dtype) {
        case DType::f16:
            static_cast<__half*>(output)[at] = from_float<__half>(value);
            break;
        case DType::bf16:
            static_cast<__nv_bfloat16*>(output)[at] = from_float<__nv_bfloat16>(value);
            break;
        default:
            static_cast<float*>(output)[at] = value;
    }
}

// Adds the sums[kWarps, N, kSumStride] of the warps, in order, for N input rows from first_input on.
template <int N>
__device__ void finish(const BitserialLinear& p, const float* sums, int64_t first_input, float unit, bool first,
                       bool last) {
    __syncthreads();
    for (int i = threadIdx.x; i < N * kWarpRows; i += kThreads) {
        const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpRows + i % kWarpRows;
        const int64_t input = first_input + i / kWarpRows;
        if (row >= p.rows || input >= p.batch) continue;
        float sum = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) sum += sums[(warp * N + i / kWarpRows) * kSumStride + i % kWarpRows];
        const int64_t at = input * p.rows + row;
        sum *= unit;
        if (!first) sum += p.partial[at];
        if (last) {
            store(p.output, at, p.dtype,
                  fmaf(p.step[p.step_per_row ? row : 0], sum, p.bias == nullptr ? 0.0f : p.bias[row]));
        } else {
            p.partial[at] = sum;
        }
    }
}

__device__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums of (code - offset) x over the tiles of a warp, whose steps are 1: they stay in the accumulators to the end.
struct Halves {
    static constexpr int kBytes = 2;
    static constexpr int kExponent = kSubnormalExponent;
    static constexpr bool kSteps = false;

    template <int K, int N>
    struct Sums {
        static constexpr int kSets = half_sets(K, 8 * N);
        static constexpr int kChains = N == 1 ? 2 : 1;

        float codes[2][kSets][N][4] = {};
        // In every row of it the offset's part, which no row of the weight needs of its own; two sums at least, since
        // an instruction waits for the one before it that adds to the same.
        float shift[kChains][N][4] = {};

        __device__ void add(const uint32_t* words, int offset, const uint32_t (&x)[N][16], const float2*) {
            const uint32_t pair = half_offset(offset);
            const uint32_t shift_operand[4] = {pair, pair, pair, pair};
#pragma unroll
            for (int p = 0; p < kPositions; ++p) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    multiply(shift[p % kChains][n], shift_operand, x[n][2 * p], x[n][2 * p + 1]);
                }
            }
            half_products<K, kSets>(words, [&](int p, int m, int set, const uint32_t (&a)[4]) {
#pragma unroll
                for (int n = 0; n < N; ++n) multiply(codes[m][set][n], a, x[n][2 * p], x[n][2 * p + 1]);
            });
        }
        __device__ float get(int m, int n, int c) const {
            float sum = shift[0][n][c];
            if constexpr (kChains == 2) sum += shift[1][n][c];
#pragma unroll
            for (int set = 0; set < kSets; ++set) {
                sum = fmaf(1.0f / static_cast<float>(1 << (field_bits(K) * set)), codes[m][set][n][c], sum);
            }
            return sum;
        }
    };
};

// Sums over tiles with a step each.
template <int N>
struct ScaledSums {
    float sums[2][N][4] = {};

    // Adds tile(m, n, c) times the steps of the input rows.
    template <class Tile>
    __device__ void add_tile(const float2* steps, Tile&& tile) {
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) {
            const int m = i % 2, n = i / 2 % N, c = i / 2 / N;
            sums[m][n][c] = fmaf(c % 2 == 0 ? steps[n].x : steps[n].y, tile(m, n, c), sums[m][n][c]);
        }
    }
    __device__ float get(int m, int n, int c) const { return sums[m][n][c]; }
};

// The same as Halves, of tiles with a step each.
struct ScaledHalves {
    static constexpr int kBytes = 2;
    static constexpr int kExponent = kSubnormalExponent;
    static constexpr bool kSteps = true;

    template <int K, int N>
    struct Sums : ScaledSums<N> {
        __device__ void add(const uint32_t* words, int offset, const uint32_t (&x)[N][16], const float2* steps) {
            Halves::Sums<K, N> tile;
            tile.add(words, offset, x, nullptr);
            this->add_tile(steps, [&](int m, int n, int c) { return tile.get(m, n, c); });
        }
    };
};

// The same of an input of integers; up to the product with the step in integers, of magnitude at most
// 128 * 255 * 127 < 2^23.
struct Bytes {
    static constexpr int kBytes = 1;
    static constexpr int kExponent = 0;
    static constexpr bool kSteps = true;

    template <int K, int N>
    struct Sums : ScaledSums<N> {
        __device__ void add(const uint32_t* words, int offset, const uint32_t (&x)[N][8], const float2* steps) {
            int32_t shift[N][4] = {};
            const uint32_t bytes = static_cast<uint32_t>(offset) * 0x01010101u;
            const uint32_t shift_operand[4] = {bytes, bytes, bytes, bytes};
            int32_t acc[2][N][4] = {};
#pragma unroll
            for (int s = 0; s < kPositions / 2; ++s) {
#pragma unroll
                for (int n = 0; n < N; ++n) multiply(shift[n], shift_operand, x[n][2 * s], x[n][2 * s + 1]);
            }
            byte_products<K>(words, [&](int s, int m, const uint32_t (&a)[4]) {
#pragma unroll
                for (int n = 0; n < N; ++n) multiply(acc[m][n], a, x[n][2 * s], x[n][2 * s + 1]);
            });
            this->add_tile(steps, [&](int m, int n, int c) { return static_cast<float>(acc[m][n][c] - shift[n][c]); });
        }
    };
};

// What a lane multiplies by: its columns of N rows of the input, and their steps, of one block after the other.
template <class Input, int N>
class Columns {
public:
    static constexpr int kVectors = kLaneColumns * Input::kBytes / 16;

    uint32_t x[N][4 * kVectors];
    float2 steps[N];

    __device__ explicit Columns(const BitserialLinear& p) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            // Past the last row that row again: nobody reads what comes of it.
            const int64_t input = min(static_cast<int64_t>(blockIdx.y) * kPassRows + 8 * n + lane / 4, p.batch - 1);
            source_[n] = static_cast<const uint4*>(p.input) + ((input * p.blocks + warp) * 4 + lane % 4) * kVectors;
        }
        if constexpr (Input::kSteps) {
            step_source_ = p.input_steps + (blockIdx.y * p.blocks + warp) * kPassRows + lane % 4 * 2;
        }
    }

    // Those of the warp's next tile. Asked for as soon as those before are multiplied: while the planes of the tile are
    // made operands, they come from a cache.
    __device__ void fetch() {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if constexpr (Input::kSteps) steps[n] = *reinterpret_cast<const float2*>(step_source_ + 8 * n);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const uint4 four = source_[n][v];
                x[n][4 * v] = four.x, x[n][4 * v + 1] = four.y, x[n][4 * v + 2] = four.z, x[n][4 * v + 3] = four.w;
            }
            source_[n] += kWarps * 4 * kVectors;
        }
        if constexpr (Input::kSteps) step_source_ += kWarps * kPassRows;
    }

private:
    const uint4* source_[N];
    const float* step_source_;
};

// 32 rows of the weight times 8 N rows of the input: each warp multiplies its tiles, then the block adds.
template <int K, class Input, int N>
__global__ void __launch_bounds__(kThreads, std::is_same_v<Input, ScaledHalves>&& N == 2 ? 1 : 2)
    bitserial_mma_kernel(const __grid_constant__ BitserialLinear p, const __grid_constant__ PlaneGroup group,
                         bool first, bool last) {
    extern __shared__ uint4 ring[];
    Tiles<K> tiles(p, group, ring);
    Columns<Input, N> columns(p);
    typename Input::template Sums<K, N> sums;
    const int blocks = static_cast<int>(p.blocks);
    int block = threadIdx.x / kWarp;
    if (block < blocks) columns.fetch();
#pragma unroll 1
    for (; block < blocks; block += kWarps) {
        uint32_t words[kLaneRows * K];
        tiles.next(words);
        sums.add(words, group.offset, columns.x, columns.steps);
        if (block + kWarps < blocks) columns.fetch();
    }

    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    const int g = lane / 4, t = lane % 4;
    float* all = reinterpret_cast<float*>(ring);
    float* mine = all + threadIdx.x / kWarp * 8 * N * kSumStride;
#pragma unroll
    for (int i = 0; i < 8 * N; ++i) {
        const int m = i % 2, n = i / 2 % N, c = i / 2 / N;
        mine[(8 * n + 2 * t + c % 2) * kSumStride + 16 * m + g + c / 2 * 8] = sums.get(m, n, c);
    }
    const int64_t first_input = static_cast<int64_t>(blockIdx.y) * kPassRows;
    finish<8 * N>(p, all, first_input, power_of_two(group.exponent + Input::kExponent), first, last);
}

// 32 rows of the weight times N rows of a float32 input.
template <int K, int N>
__global__ void __launch_bounds__(kThreads, N == 1 ? 2 : 1)
    bitserial_fma_kernel(const __grid_constant__ BitserialLinear p, const __grid_constant__ PlaneGroup group,
                         bool first, bool last) {
    extern __shared__ uint4 ring[];
    const int lane = threadIdx.x % kWarp;
    const int g = lane / 4, t = lane % 4;
    const int64_t first_input = static_cast<int64_t>(blockIdx.y) * N;
    Tiles<K> tiles(p, group, ring);
    const float4* source = static_cast<const float4*>(p.input) + t * kPositions;
    const int64_t input_stride = p.blocks * kWarpColumns / 4;

    float sums[kLaneRows][N] = {};
    for (int64_t block = threadIdx.x / kWarp; block < p.blocks; block += kWarps) {
        uint32_t words[kLaneRows * K];
        tiles.next(words);
        float acc[kLaneRows][N] = {};
        const auto load = [&](int position, int n, float (&x)[4]) {
            float4 four = {};
            if (first_input + n < p.batch) {
                four = source[(first_input + n) * input_stride + block * (kWarpColumns / 4) + position];
            }
            x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        };
        float_products<K, N>(words, group.offset, load, acc);
#pragma unroll
        for (int i = 0; i < kLaneRows * N; ++i) sums[i / N][i % N] += acc[i / N][i % N];
    }

    __syncthreads();
    float* all = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < kLaneRows * N; ++i) {
        const int r = i / N, n = i % N;
        float sum = sums[r][n];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (t == 0) all[(threadIdx.x / kWarp * N + n) * kSumStride + 8 * r + g] = sum;
    }
    finish<N>(p, all, first_input, power_of_two(group.exponent), first, last);
}

LaunchStatus status_of(const char* kernel, cudaError_t error) {
    return error == cudaSuccess ? LaunchStatus{} : LaunchStatus{kernel, cudaGetErrorString(error)};
}

using LinearKernel = void (*)(BitserialLinear, PlaneGroup, bool, bool);

struct LinearVariant {
    LinearKernel kernel;
    int inputs;  // rows of the input that a block serves
    const char* name;
};

template <int K>
LinearVariant variant(const BitserialLinear& p) {
    const bool narrow = p.batch <= kPassRows / 2;
    switch (p.arithmetic) {
        case Arithmetic::f16:
            if (p.input_steps == nullptr) {
                return {narrow ? bitserial_mma_kernel<K, Halves, 1> : bitserial_mma_kernel<K, Halves, 2>, kPassRows,
                        "bitserial_mma_kernel"};
            }
            return {narrow ? bitserial_mma_kernel<K, ScaledHalves, 1> : bitserial_mma_kernel<K, ScaledHalves, 2>,
                    kPassRows, "bitserial_mma_kernel"};
        case Arithmetic::i8:
            return {narrow ? bitserial_mma_kernel<K, Bytes, 1> : bitserial_mma_kernel<K, Bytes, 2>, kPassRows,
                    "bitserial_mma_kernel"};
        default:
            if (p.batch == 1) return {bitserial_fma_kernel<K, 1>, 1, "bitserial_fma_kernel"};
            return {bitserial_fma_kernel<K, kFloatRows>, kFloatRows, "bitserial_fma_kernel"};
    }
}

LinearVariant variant(const BitserialLinear& p, int planes) {
    switch (planes) {
        case 1:
            return variant<1>(p);
        case 2:
            return variant<2>(p);
        case 3:
            return variant<3>(p);
        case 4:
            return variant<4>(p);
        case 5:
            return variant<5>(p);
        case 6:
            return variant<6>(p);
        case 7:
            return variant<7>(p);
        default:
            return variant<8>(p);
    }
}

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

__device__ float warp_max(float value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, lane));
    return value;
}

// A warp prepares a block as reference.quantize does without a group limit, a lane 4 of its columns.
template <class T, Arithmetic kTarget>
__global__ void __launch_bounds__(kThreads)
    bitserial_prepare_kernel(const __grid_constant__ BitserialInput p, int64_t blocks) {
    constexpr float kLimit = 127.0f, kSmallestNormal = 1.17549435e-38f;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (item >= p.batch * blocks) return;
    const int64_t input = item / blocks, block = item % blocks;
    const T* source = static_cast<const T*>(p.input) + input * p.columns;
    float x[4], size[4];
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int64_t column = block * kWarpColumns + 4 * lane + c;
        x[c] = column < p.columns ? to_float(source[column]) : 0.0f;
        size[c] = fabsf(x[c]);
        finite &= isfinite(x[c]);
    }
    const float largest = warp_max(fmaxf(fmaxf(size[0], size[1]), fmaxf(size[2], size[3])));
    float step;
    if constexpr (kTarget == Arithmetic::i8) {
        step = largest / kLimit;
        step = step < kSmallestNormal ? 0.0f : step;
        const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
        const bool usable = __all_sync(~0u, finite);
        step = usable ? step : __int_as_float(0x7fc00000);
        uint32_t word = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int q = usable ? __float2int_rn(x[c] * inverse) : 0;
            word |= (static_cast<uint32_t>(q) & 0xffu) << (8 * byte_of_column(c));
        }
        static_cast<uint32_t*>(p.prepared)[item * kWarp + lane] = word;
    } else {
        // The largest becomes at least 2^14 and the least that is still exact 2^-28 of it.
        const int exponent = max((__float_as_int(largest) >> 23) - 127, -112);
        const float factor = power_of_two(14 - exponent);
        step = power_of_two(exponent - 14);
        __half2* pairs = static_cast<__half2*>(p.prepared) + (item * kWarp + lane) * 2;
        pairs[0] = __floats2half2_rn(x[0] * factor, x[1] * factor);
        pairs[1] = __floats2half2_rn(x[2] * factor, x[3] * factor);
    }
    if (lane == 0) p.steps[(input / kPassRows * blocks + block) * kPassRows + input % kPassRows] = step;
}

// Elements that move in one access of 16 bytes.
template <class T>
struct alignas(sizeof(uint4)) Run {
    static constexpr int kLength = sizeof(uint4) / sizeof(T);
    T lane[kLength];
};

template <class T, bool kTiled, bool kByte>
__global__ void __launch_bounds__(kThreads, 2)
    bitserial_weight_kernel(const __grid_constant__ BitserialWeight p, int64_t items, int offset) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (item >= items) return;
    WeightItem made;
    make_weights<kTiled, kByte>(p, item, offset, made);
    T* output = static_cast<T*>(p.output) + made.first;
    Run<T> run[kLaneColumns / Run<T>::kLength];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        run[i / Run<T>::kLength].lane[i % Run<T>::kLength] = from_float<T>(made.value[i]);
    }
    if (made.count == kLaneColumns && reinterpret_cast<uintptr_t>(output) % sizeof(uint4) == 0) {
#pragma unroll
        for (int i = 0; i < kLaneColumns / Run<T>::kLength; ++i) reinterpret_cast<Run<T>*>(output)[i] = run[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        if (i < made.count) output[i] = run[i / Run<T>::kLength].lane[i % Run<T>::kLength];
    }
}

unsigned blocks_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

template <class T>
void launch_weight(const BitserialWeight& p, int64_t items, int offset, Stream stream) {
    const bool byte = p.exponents[0] < 8;
    const auto tiled = byte ? bitserial_weight_kernel<T, true, true> : bitserial_weight_kernel<T, true, false>;
    const auto canonical = byte ? bitserial_weight_kernel<T, false, true> : bitserial_weight_kernel<T, false, false>;
    const auto kernel = p.blocks > 0 ? tiled : canonical;
    kernel<<<blocks_of(items, kThreads), kThreads, 0, stream>>>(p, items, offset);
}

}  // namespace

LaunchStatus bitserial_linear(const BitserialLinear& params, const PlaneGroup* groups, int count, Stream stream) {
    for (int i = 0; i < count; ++i) {
        const LinearVariant chosen = variant(params, groups[i].planes);
        const int shared = ring_bytes(groups[i].planes);
        // More than 48 KiB have to be asked for, on each device.
        const cudaError_t error =
            cudaFuncSetAttribute(chosen.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return status_of(chosen.name, error);
        const dim3 grid(blocks_of(params.rows, kWarpRows), blocks_of(params.batch, chosen.inputs));
        chosen.kernel<<<grid, kThreads, shared, stream>>>(params, groups[i], i == 0, i == count - 1);
        if (const auto status = status_of(chosen.name, cudaGetLastError()); status.reason) return status;
    }
    return {};
}

LaunchStatus bitserial_prepare(const BitserialInput& params, Stream stream) {
    const int64_t blocks = (params.columns + kWarpColumns - 1) / kWarpColumns;
    using Kernel = void (*)(BitserialInput, int64_t);
    Kernel kernel = bitserial_prepare_kernel<__nv_bfloat16, Arithmetic::f16>;
    if (params.arithmetic == Arithmetic::i8) {
        kernel = params.dtype == DType::f32   ? bitserial_prepare_kernel<float, Arithmetic::i8>
                 : params.dtype == DType::f16 ? bitserial_prepare_kernel<__half, Arithmetic::i8>
                                              : bitserial_prepare_kernel<__nv_bfloat16, Arithmetic::i8>;
    }
    kernel<<<blocks_of(params.batch * blocks, kWarps), kThreads, 0, stream>>>(params, blocks);
    return status_of("bitserial_prepare_kernel", cudaGetLastError());
}

LaunchStatus bitserial_weight(const BitserialWeight& params, Stream stream) {
    const int64_t items = weight_items(params);
    const int offset = total_offset(params);
    switch (params.dtype) {
        case DType::f16:
            launch_weight<__half>(params, items, offset, stream);
            break;
        case DType::bf16:
            launch_weight<__nv_bfloat16>(params, items, offset, stream);
            break;
        default:
            launch_weight<float>(params, items, offset, stream);
    }
    return status_of("bitserial_weight_kernel", cudaGetLastError());
}

}  // namespace csq::cuda
