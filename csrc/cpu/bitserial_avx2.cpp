// Products with packed weights for x86 processors with AVX2 and FMA.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace csq::cpu {
namespace {

struct V {
    using v = __m256i;
    using f = __m256;
    static constexpr int bytes = 32;
    static constexpr int slice_bits = 7;
    static constexpr int table_copies = 1;
    static constexpr int table_groups = 2;  // whose tables are read at once
    // Of a block of sums: of 16 registers, 8 or 12 hold sums, the others weights, inputs and products.
    static constexpr int rows = 2, batch = 4, float_batch = 6, tall_batch = 8;

    static v zero() { return _mm256_setzero_si256(); }
    static v set1(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
    static v set1_16(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
    static v set1_32(int32_t x) { return _mm256_set1_epi32(x); }
    static v load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const v*>(p)); }
    static v and_(v a, v b) { return _mm256_and_si256(a, b); }
    template <int N>
    static v srl(v a) {
        return _mm256_srli_epi16(a, N);
    }
    static v sub8(v a, v b) { return _mm256_sub_epi8(a, b); }
    static v add16(v a, v b) { return _mm256_add_epi16(a, b); }
    static v add32(v a, v b) { return _mm256_add_epi32(a, b); }
    static v shuffle(v table, v index) { return _mm256_shuffle_epi8(table, index); }
    static v maddubs(v a, v b) { return _mm256_maddubs_epi16(a, b); }
    static v madd(v a, v b) { return _mm256_madd_epi16(a, b); }
    // Sums of four products of an unsigned and a signed byte, with weights of at most 7 bits.
    static v dot(v sum, v weights, v inputs) { return add32(sum, madd(maddubs(weights, inputs), set1_16(1))); }
    static __m256i fold(v a) { return a; }

    // The tables of the groups that vector i of a plane holds.
    template <int T>
    static v table(const uint8_t* tables, int i, int t) {
        const uint8_t* at = T == 1 ? tables + 16 * i : tables + 64 * (i / 2) + 32 * t + 16 * (i % 2);
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static __m256i select(__m256i mask, __m256i a, __m256i b) {
        return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
    }
    static v load_32(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const v*>(p)); }
    static void store_32(int32_t* p, v a) { _mm256_store_si256(reinterpret_cast<v*>(p), a); }
    static void add_scaled(float* to, float factor, v sums) {
        _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(factor), _mm256_load_ps(to)));
    }

    // Byte C of each 32 bits.
    template <int C, bool Signed>
    static f column_to_float(v bytes) {
        const v top = C == 3 ? bytes : _mm256_slli_epi32(bytes, 24 - 8 * C);
        return _mm256_cvtepi32_ps(Signed ? _mm256_srai_epi32(top, 24) : _mm256_srli_epi32(top, 24));
    }
    static f zero_f() { return _mm256_setzero_ps(); }
    static f set1_f(float x) { return _mm256_set1_ps(x); }
    static f load_f(const float* p) { return _mm256_load_ps(p); }
    static void store_f(float* p, f a) { _mm256_store_ps(p, a); }
    static f add_f(f a, f b) { return _mm256_add_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
};

#include "cpu/bitserial_x86.h"

}  // namespace

const BitserialKernels kAvx2Bitserial = kBitserial;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
