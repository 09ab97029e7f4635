// The vector of 64 bytes. Included inside a target region and an anonymous namespace, as bitserial_x86.h is.

struct Bytes512 {
    using v = __m512i;
    using f = __m512;
    static constexpr int bytes = 64;
    static constexpr int table_copies = 2;
    static constexpr int table_groups = 2;  // whose tables are read at once
    // Of a block of sums: 24 of 32 registers, and 4 for weights.
    static constexpr int rows = 4, batch = 6, float_batch = 6, tall_batch = 12;

    static v zero() { return _mm512_setzero_si512(); }
    static v set1(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static v set1_16(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
    static v set1_32(int32_t x) { return _mm512_set1_epi32(x); }
    static v load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static v and_(v a, v b) { return _mm512_and_si512(a, b); }
    template <int N>
    static v srl(v a) {
        return _mm512_srli_epi16(a, N);
    }
    static v sub8(v a, v b) { return _mm512_sub_epi8(a, b); }
    static v add16(v a, v b) { return _mm512_add_epi16(a, b); }
    static v add32(v a, v b) { return _mm512_add_epi32(a, b); }
    static v shuffle(v table, v index) { return _mm512_shuffle_epi8(table, index); }
    static v maddubs(v a, v b) { return _mm512_maddubs_epi16(a, b); }
    static v madd(v a, v b) { return _mm512_madd_epi16(a, b); }
    static __m256i fold(v a) { return _mm256_add_epi16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)); }

    // The tables of the two groups that vector i of a plane holds, each twice.
    template <int T>
    static v table(const uint8_t* tables, int i, int t) {
        return load(tables + 64 * (T * i + t));
    }
    static __m256i select(__m256i mask, __m256i a, __m256i b) { return _mm256_ternarylogic_epi32(mask, a, b, 0xca); }
    static v load_32(const int32_t* p) { return _mm512_load_si512(reinterpret_cast<const v*>(p)); }
    static void store_32(int32_t* p, v a) { _mm512_store_si512(reinterpret_cast<v*>(p), a); }
    static void add_scaled(float* to, float factor, v sums) {
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(factor), _mm512_load_ps(to)));
    }

    // Byte C of each 32 bits.
    template <int C, bool Signed>
    static f column_to_float(v bytes) {
        const v top = C == 3 ? bytes : _mm512_slli_epi32(bytes, 24 - 8 * C);
        return _mm512_cvtepi32_ps(Signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24));
    }
    static f zero_f() { return _mm512_setzero_ps(); }
    static f set1_f(float x) { return _mm512_set1_ps(x); }
    static f load_f(const float* p) { return _mm512_load_ps(p); }
    static void store_f(float* p, f a) { _mm512_store_ps(p, a); }
    static f add_f(f a, f b) { return _mm512_add_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
};
