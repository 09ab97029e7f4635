// Products with packed weights for x86 processors with AVX-512 and its byte products with sums of 32 bits.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace csq::cpu {
namespace {

#include "cpu/bitserial_avx512.h"

struct V : Bytes512 {
    static constexpr int slice_bits = 8;
    static v dot(v sum, v weights, v inputs) { return _mm512_dpbusd_epi32(sum, weights, inputs); }
};

#include "cpu/bitserial_x86.h"

}  // namespace

const BitserialKernels kAvx512VnniBitserial = kBitserial;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
