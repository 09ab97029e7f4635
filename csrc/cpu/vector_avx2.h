// A vector of 8 floats, for code inside a region of target avx2, fma and f16c.
#pragma once

#include "cpu/kernels.h"

namespace csq::cpu {
namespace {

struct Avx2 {
    using f = __m256;
    using u = __m256i;
    struct Doubles {
        __m256d low, high;
    };
    static constexpr int64_t width = 8;

    static f set1(float x) { return _mm256_set1_ps(x); }
    static f load(const float* p) { return _mm256_loadu_ps(p); }
    static f load(const bf16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static f load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static void store(float* p, f x) { _mm256_storeu_ps(p, x); }
    static void store(bf16* p, f x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static void store(f16* p, f x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    static f add(f a, f b) { return _mm256_add_ps(a, b); }
    static f sub(f a, f b) { return _mm256_sub_ps(a, b); }
    static f mul(f a, f b) { return _mm256_mul_ps(a, b); }
    static f div(f a, f b) { return _mm256_div_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
    static f max(f a, f b) { return _mm256_max_ps(a, b); }
    static f exponent(f x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
    static f zero_where_greater(f y, f x, f limit) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ), y); }
    static f zero_where_zero(f y, f x) {
        return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ), y);
    }

    static f min(f a, f b) { return _mm256_min_ps(a, b); }
    static f sqrt(f x) { return _mm256_sqrt_ps(x); }
    static float largest(f x) {
        float lanes[8];
        _mm256_storeu_ps(lanes, x);
        return *std::max_element(lanes, lanes + 8);
    }

    static u bits(f x) { return _mm256_castps_si256(x); }
    static f from_bits(u x) { return _mm256_castsi256_ps(x); }
    static f from_integer(u x) { return _mm256_cvtepi32_ps(x); }
    static u truncate(f x) { return _mm256_cvttps_epi32(x); }
    static u splat(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static u count_from(uint32_t x) { return _mm256_add_epi32(splat(x), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    static u add(u a, u b) { return _mm256_add_epi32(a, b); }
    static u mul(u a, u b) { return _mm256_mullo_epi32(a, b); }
    static u exclusive_or(u a, u b) { return _mm256_xor_si256(a, b); }
    static u both(u a, u b) { return _mm256_and_si256(a, b); }
    static u either(u a, u b) { return _mm256_or_si256(a, b); }
    static u at_least(u a, u b) { return _mm256_max_epi32(a, b); }
    template <int n>
    static u right(u x) {
        return _mm256_srli_epi32(x, n);
    }
    template <int n>
    static u left(u x) {
        return _mm256_slli_epi32(x, n);
    }
    // Where x < limit as signed integers, `yes`; elsewhere `no`.
    static u where_less(u x, u limit, u yes, u no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(limit, x)); }
    static u load_bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_bytes(uint8_t* p, u x) {
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    static void store_words(uint16_t* p, u x) {
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
    }

    static Doubles no_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
    static void add_to(Doubles& sum, f x) {
        sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
        sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    }
    static double total(Doubles sum) {
        double lanes[4];
        _mm256_storeu_pd(lanes, _mm256_add_pd(sum.low, sum.high));
        return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }

    static void stream_lines(void* target, const void* source, int64_t lines) {
        auto* to = static_cast<__m256i*>(target);
        const auto* from = static_cast<const __m256i*>(source);
        for (int64_t i = 0; i < 2 * lines; ++i) _mm256_stream_si256(to + i, _mm256_loadu_si256(from + i));
    }
    static void fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace csq::cpu
