// A vector of 16 floats, for code inside a region of target avx512f, avx512bw, avx512dq, avx512vl, fma and f16c.
#pragma once

#include "cpu/kernels.h"

namespace csq::cpu {
namespace {

struct Avx512 {
    using f = __m512;
    using u = __m512i;
    struct Doubles {
        __m512d low, high;
    };
    static constexpr int64_t width = 16;

    static f set1(float x) { return _mm512_set1_ps(x); }
    static f load(const float* p) { return _mm512_loadu_ps(p); }
    static f load(const bf16* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static f load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static void store(float* p, f x) { _mm512_storeu_ps(p, x); }
    static void store(bf16* p, f x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
    static void store(f16* p, f x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    static f add(f a, f b) { return _mm512_add_ps(a, b); }
    static f sub(f a, f b) { return _mm512_sub_ps(a, b); }
    static f mul(f a, f b) { return _mm512_mul_ps(a, b); }
    static f div(f a, f b) { return _mm512_div_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
    static f max(f a, f b) { return _mm512_max_ps(a, b); }
    static f exponent(f x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
    static f zero_where_greater(f y, f x, f limit) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NGT_UQ), y);
    }
    static f zero_where_zero(f y, f x) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), y);
    }

    static f min(f a, f b) { return _mm512_min_ps(a, b); }
    static f sqrt(f x) { return _mm512_sqrt_ps(x); }
    static float largest(f x) { return _mm512_reduce_max_ps(x); }

    static u bits(f x) { return _mm512_castps_si512(x); }
    static f from_bits(u x) { return _mm512_castsi512_ps(x); }
    static f from_integer(u x) { return _mm512_cvtepi32_ps(x); }
    static u truncate(f x) { return _mm512_cvttps_epi32(x); }
    static u splat(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static u count_from(uint32_t x) {
        return _mm512_add_epi32(splat(x), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    }
    static u add(u a, u b) { return _mm512_add_epi32(a, b); }
    static u mul(u a, u b) { return _mm512_mullo_epi32(a, b); }
    static u exclusive_or(u a, u b) { return _mm512_xor_si512(a, b); }
    static u both(u a, u b) { return _mm512_and_si512(a, b); }
    static u either(u a, u b) { return _mm512_or_si512(a, b); }
    static u at_least(u a, u b) { return _mm512_max_epi32(a, b); }
    template <int n>
    static u right(u x) {
        return _mm512_srli_epi32(x, n);
    }
    template <int n>
    static u left(u x) {
        return _mm512_slli_epi32(x, n);
    }
    // Where x < limit as signed integers, `yes`; elsewhere `no`.
    static u where_less(u x, u limit, u yes, u no) {
        return _mm512_mask_mov_epi32(no, _mm512_cmplt_epi32_mask(x, limit), yes);
    }
    static u load_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_bytes(uint8_t* p, u x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
    }
    static void store_words(uint16_t* p, u x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
    }

    static Doubles no_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
    static void add_to(Doubles& sum, f x) {
        sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
        sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    }
    static double total(Doubles sum) {
        double lanes[8];
        _mm512_storeu_pd(lanes, _mm512_add_pd(sum.low, sum.high));
        return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }

    static void stream_lines(void* target, const void* source, int64_t lines) {
        auto* to = static_cast<__m512i*>(target);
        const auto* from = static_cast<const __m512i*>(source);
        for (int64_t i = 0; i < lines; ++i) _mm512_stream_si512(to + i, _mm512_loadu_si512(from + i));
    }
    static void fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace csq::cpu
