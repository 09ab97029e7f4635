// The kernels for x86 processors with AVX2, FMA and F16C.
#include "cpu/kernels.h"

#if CSQ_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/reconstruct_kernel.h"

namespace csq::cpu {
namespace {

struct Avx2 {
    using f = __m256;
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

const ReconstructKernels kAvx2Kernels = kKernels<Avx2>;

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
