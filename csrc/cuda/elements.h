// Elements of arrays in registers, and how they come there and back; for files that nvcc compiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/instructions.h"
#include "cuda/launch.h"

namespace csq::cuda {

constexpr int kAccessBytes = 16;

// A register of one or two elements, and their values.
template <class T>
struct Word;
template <>
struct Word<float> {
    static __device__ void widen(uint32_t bits, float* x) { *x = __uint_as_float(bits); }
    static __device__ uint32_t narrow(const float* x) { return __float_as_uint(*x); }
};
template <>
struct Word<__nv_bfloat16> {
    static __device__ void widen(uint32_t bits, float* x) {
        x[0] = __uint_as_float(bits << 16);
        x[1] = __uint_as_float(bits & 0xffff0000u);
    }
    static __device__ uint32_t narrow(const float* x) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
        return reinterpret_cast<const uint32_t&>(pair);
    }
};
template <>
struct Word<__half> {
    static __device__ void widen(uint32_t bits, float* x) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits));
        x[0] = pair.x;
        x[1] = pair.y;
    }
    static __device__ uint32_t narrow(const float* x) {
        const __half2 pair = __floats2half2_rn(x[0], x[1]);
        return reinterpret_cast<const uint32_t&>(pair);
    }
};

// V elements that move in one access: 16 bytes of them, or one.
template <class T, int V>
struct Vector {
    uint4 bits;

    __device__ void get(float (&x)[V]) const {
        Word<T>::widen(bits.x, x);
        Word<T>::widen(bits.y, x + V / 4);
        Word<T>::widen(bits.z, x + V / 2);
        Word<T>::widen(bits.w, x + V / 4 * 3);
    }
    static __device__ Vector of(const float (&x)[V]) {
        return {{Word<T>::narrow(x), Word<T>::narrow(x + V / 4), Word<T>::narrow(x + V / 2),
                 Word<T>::narrow(x + V / 4 * 3)}};
    }
};
template <class T>
struct Vector<T, 1> {
    T element;

    __device__ void get(float (&x)[1]) const { x[0] = static_cast<float>(element); }
    static __device__ Vector of(const float (&x)[1]) { return {static_cast<T>(x[0])}; }
};

// V neighbours of an array that lie in any number of accesses: of 16 bytes, or of 8 if they take no more, where the
// array allows it (kWhole); else of one element each. `count` of them exist, all or none if whole; the rest is 0.
template <class T, int V, bool kWhole>
struct Elements {
    static constexpr int kBytes = V * static_cast<int>(sizeof(T));
    static constexpr int kWords = (kBytes + 3) / 4;
    static constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
    static constexpr bool kWide = kWhole && kBytes % 8 == 0;
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;

    uint32_t words[kWords];

    __device__ void load(const void* array, int64_t at, int count) {
        const T* source = static_cast<const T*>(array) + at;
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = 0;
        if (count == 0) return;
        if constexpr (!kWide) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (v >= count) break;
                const uint32_t bits = reinterpret_cast<const Bits*>(source)[v];
                words[v / kInWord] |= bits << (v % kInWord * 8 * sizeof(T));
            }
        } else if constexpr (kBytes % kAccessBytes == 0) {
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 part = reinterpret_cast<const uint4*>(source)[i];
                words[4 * i] = part.x;
                words[4 * i + 1] = part.y;
                words[4 * i + 2] = part.z;
                words[4 * i + 3] = part.w;
            }
        } else {
            const uint2 both = *reinterpret_cast<const uint2*>(source);
            words[0] = both.x;
            words[1] = both.y;
        }
    }
    __device__ void store(void* array, int64_t at, int count) const {
        T* target = static_cast<T*>(array) + at;
        if (count == 0) return;
        if constexpr (!kWide) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (v >= count) break;
                reinterpret_cast<Bits*>(target)[v] =
                    static_cast<Bits>(words[v / kInWord] >> (v % kInWord * 8 * sizeof(T)));
            }
        } else if constexpr (kBytes % kAccessBytes == 0) {
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                store_wide(reinterpret_cast<uint4*>(target) + i, words + 4 * i);
            }
        } else {
            const uint2 both = make_uint2(words[0], words[1]);
            *reinterpret_cast<uint2*>(target) = both;
        }
    }

    __device__ void get(float (&x)[V]) const {
        if constexpr (V == 1) {
            float pair[2];
            Word<T>::widen(words[0], pair);
            x[0] = pair[0];
        } else {
#pragma unroll
            for (int i = 0; i < kWords; ++i) Word<T>::widen(words[i], x + i * kInWord);
        }
    }
    __device__ void set(const float (&x)[V]) {
        if constexpr (V == 1) {
            const float pair[2] = {x[0], 0.0f};
            words[0] = Word<T>::narrow(pair);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; ++i) words[i] = Word<T>::narrow(x + i * kInWord);
        }
    }
};

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0; }

inline LaunchStatus launched(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? LaunchStatus{} : LaunchStatus{kernel, cudaGetErrorString(error)};
}

}  // namespace csq::cuda
