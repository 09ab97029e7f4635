// Approximate arithmetic of a CUDA device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace csq::cuda {

// What core/soft_bits.h and core/step.h ask for.
struct Instructions {
    static __device__ float exp2(float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    static __device__ float reciprocal(float x) {
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    static __device__ float root(float x) {
        float y;
        asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    static __device__ float quotient(float x, float y) {
        float z;
        asm("div.full.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
        return z;
    }
    static __device__ float smaller(float x, float y) {
        float z;
        asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
        return z;
    }
    static __device__ float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
};

// 16 bytes in one access, which compilers take apart where the words come from arithmetic.
__device__ inline void store_wide(uint4* target, const uint32_t* words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

}  // namespace csq::cuda
