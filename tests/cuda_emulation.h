// Enough of CUDA to run the kernels on the processor: a thread of a block is a coroutine, and whoever waits for others
// lets them run. Approximate instructions are exact here. Included before everything else in a translated .cu file.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "core/half.h"

#define __device__
#define __host__
#define __global__ static
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::min;

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y;
    dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

template <class Bits>
struct SixteenBits {
    Bits value;
    SixteenBits() = default;
    explicit SixteenBits(float x) : value(csq::from_float<Bits>(x)) {}
    explicit operator float() const { return csq::to_float(value); }
};
using __nv_bfloat16 = SixteenBits<csq::bf16>;
using __half = SixteenBits<csq::f16>;
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half2 {
    __half x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 pair) { return {static_cast<float>(pair.x), static_cast<float>(pair.y)}; }
inline float __uint_as_float(uint32_t bits) { return csq::bits_float(bits); }
inline uint32_t __float_as_uint(float x) { return csq::float_bits(x); }

template <class T>
T __ldg(const T* place) {
    return *place;
}

namespace csq::cuda {

struct Instructions {
    static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
    static float exp2(float x) { return flushed(static_cast<float>(std::exp2(static_cast<double>(x)))); }
    static float reciprocal(float x) { return flushed(1.0f / x); }
    static float root(float x) { return std::sqrt(x); }
    static float quotient(float x, float y) { return x / y; }
    static float smaller(float x, float y) { return x < y || std::isnan(x) ? x : y; }
    static float fma(float x, float y, float z) { return std::fma(x, y, z); }
};
inline void store_wide(uint4* target, const uint32_t* words) { std::memcpy(target, words, sizeof(uint4)); }

}  // namespace csq::cuda

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline dim3 gridDim, blockIdx, threadIdx;
inline void* dynamic_shared;

class Block {
public:
    static Block& current() {
        static Block block;
        return block;
    }

    void run(unsigned threads, const std::function<void()>& work) {
        kernel = work;
        coroutines.resize(threads);
        for (auto& coroutine : coroutines) {
            if (!coroutine.stack) coroutine.stack = std::make_unique<char[]>(kStack);
            getcontext(&coroutine.context);
            coroutine.context.uc_stack.ss_sp = coroutine.stack.get();
            coroutine.context.uc_stack.ss_size = kStack;
            coroutine.context.uc_link = &scheduler;
            coroutine.done = false;
            makecontext(&coroutine.context, enter, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (unsigned i = 0; i < threads; ++i) {
                if (coroutines[i].done) continue;
                threadIdx = dim3(i);
                swapcontext(&scheduler, &coroutines[i].context);
                any = true;
            }
        }
    }
    // Returns when every other thread has got as far.
    void wait() {
        const unsigned own = threadIdx.x;
        swapcontext(&coroutines[own].context, &scheduler);
    }

private:
    static constexpr size_t kStack = 128 << 10;
    struct Coroutine {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        bool done;
    };
    static void enter() {
        Block& block = current();
        block.kernel();
        block.coroutines[threadIdx.x].done = true;
    }

    ucontext_t scheduler;
    std::vector<Coroutine> coroutines;
    std::function<void()> kernel;
};

inline void __syncthreads() { Block::current().wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    static T values[1024];
    values[threadIdx.x] = value;
    Block::current().wait();
    const T other = values[threadIdx.x ^ static_cast<unsigned>(mask)];
    Block::current().wait();
    return other;
}

// kernel<<<grid, threads, shared, stream>>>(arguments) is translated to kernel * Launch(...) * forward_as_tuple(...).
struct Launch {
    dim3 grid;
    unsigned threads;
    size_t shared;

    template <class Stream>
    Launch(dim3 grid, unsigned threads, size_t shared, Stream) : grid(grid), threads(threads), shared(shared) {}
};
template <class... Parameters>
struct Launchable {
    void (*kernel)(Parameters...);
    Launch launch;
};
template <class... Parameters>
Launchable<Parameters...> operator*(void (*kernel)(Parameters...), const Launch& launch) {
    return {kernel, launch};
}
template <class... Parameters, class... Arguments>
void operator*(const Launchable<Parameters...>& target, const std::tuple<Arguments...>& arguments) {
    std::vector<double> shared(target.launch.shared / sizeof(double) + 1, NAN);
    dynamic_shared = shared.data();
    gridDim = target.launch.grid;
    const std::tuple<Parameters...> values(arguments);
    for (unsigned y = 0; y < gridDim.y; ++y) {
        for (unsigned x = 0; x < gridDim.x; ++x) {
            blockIdx = dim3(x, y);
            Block::current().run(target.launch.threads, [&] { std::apply(target.kernel, values); });
        }
    }
}
