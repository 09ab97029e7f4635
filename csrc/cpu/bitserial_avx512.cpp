// Products with packed weights for x86 processors with AVX-512 F, BW, DQ and VL.
#include "cpu/bitserial_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace csq::cpu {
namespace {

#include "cpu/bitserial_avx512.h"

struct V : Bytes512 {
    static constexpr int slice_bits = 7;
    static v dot(v sum, v weights, v inputs) { return add32(sum, madd(maddubs(weights, inputs), set1_16(1))); }
};

#include "cpu/bitserial_x86.h"

}  // namespace

const BitserialKernels kAvx512Bitserial = kBitserial;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
