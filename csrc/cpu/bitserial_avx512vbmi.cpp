// Products with packed weights for x86 processors with AVX-512, byte products, shuffles of bytes (VBMI) and products of
// bit matrices (GFNI).
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
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")
#endif

namespace csq::cpu {
namespace {

#include "cpu/bitserial_avx512.h"

struct V : Bytes512 {
    static constexpr int slice_bits = 8;
    static constexpr int table_copies = 1;
    static constexpr int table_groups = 4;
    static v dot(v sum, v weights, v inputs) { return _mm512_dpbusd_epi32(sum, weights, inputs); }
};

#include "cpu/bitserial_x86.h"

// Shuffles of the bytes of two vectors of 32-byte parts: dword `lane` is made of byte k(lane) of each part.
struct Orders {
    alignas(64) uint8_t look_up[2][64];
    alignas(64) uint8_t unpack[2][64];
    alignas(64) int32_t rows[16];

    constexpr Orders() : look_up(), unpack(), rows() {
        for (int half = 0; half < 2; ++half) {
            for (int lane = 0; lane < 16; ++lane) {
                for (int part = 0; part < 4; ++part) {
                    // Eight rows of one vector of 16, then eight of the next; low and high nibbles are 8 rows apart.
                    look_up[half][4 * lane + part] = byte_of(part, lane % 8, 2 * half + lane / 8);
                    // In each 128 bits two of one vector, then two of the next, for the interleaving that follows. The
                    // last plane first, as the rows of a matrix are counted.
                    unpack[half][4 * lane + 3 - part] = byte_of(part, lane / 4 * 2 + lane % 2, 2 * half + lane / 2 % 2);
                }
            }
        }
        for (int lane = 0; lane < 16; ++lane) rows[lane] = lane < 8 ? 2 * lane : 2 * lane - 15;
    }

private:
    static constexpr uint8_t byte_of(int part, int row, int vector) {
        return static_cast<uint8_t>(32 * part + 16 * (row / 4) + 4 * vector + row % 4);
    }
};
constexpr Orders kOrders;

// Four groups of a row side by side in 32 bits are looked up in their four tables by one shuffle and added up by one
// product with ones.
template <int T>
void look_up_groups(const uint8_t* tiles, const PlaneSet& planes, int64_t blocks, const uint8_t* tables,
                    const TableBlock* descriptions, float* out) {
    constexpr int kQuads = kPartGroups<T> / 4;
    const __m512i order[2] = {_mm512_load_si512(kOrders.look_up[0]), _mm512_load_si512(kOrders.look_up[1])};
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1), table_of = _mm512_set1_epi32(0x30201000);
    const Powers powers(planes);
    __m512 total[4];
    for (auto& vector : total) vector = _mm512_setzero_ps();
    const uint8_t* ahead = tiles + kPrefetch;
    const int64_t parts = blocks * kParts<T>;
    for (int64_t part = 0; part < parts; ++part, tables += kQuads * T * 64) {
        const uint8_t* plane = tiles + part / kParts<T> * planes.count * kPlaneBytes;
        plane += part % kParts<T> * kPartGroups<T> * kGroupBytes;
        __m512i sums[T][4];
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < 4; ++i) sums[t][i] = _mm512_setzero_si512();
        }
        for (int p = 0; p < planes.count; ++p, plane += kPlaneBytes) {
            const __m128i shift = _mm_cvtsi32_si128(p == 0 ? 0 : planes.exponents[p - 1] - planes.exponents[p]);
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) sums[t][i] = _mm512_sll_epi32(sums[t][i], shift);
            }
#pragma GCC unroll 2
            for (int quad = 0; quad < kQuads; ++quad, ahead += 128) {
                __builtin_prefetch(ahead);
                __builtin_prefetch(ahead + 64);
                const __m512i groups01 = V::load(plane + 128 * quad), groups23 = V::load(plane + 128 * quad + 64);
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const __m512i both = _mm512_permutex2var_epi8(groups01, order[half], groups23);
                    const __m512i index[2] = {
                        _mm512_ternarylogic_epi32(both, nibble, table_of, 0xea),  // both & nibble | table_of
                        _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), nibble, table_of, 0xea)};
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        const __m512i table = V::load(tables + 64 * (T * quad + t));
#pragma GCC unroll 2
                        for (int h = 0; h < 2; ++h) {
                            const __m512i found = _mm512_permutexvar_epi8(index[h], table);
                            sums[t][2 * half + h] = _mm512_dpbusd_epi32(sums[t][2 * half + h], found, ones);
                        }
                    }
                }
            }
        }
        const TableBlock& d = descriptions[part];
        const int64_t correction = powers.correction(d);
        const int64_t upper = T == 2 ? correction >> 8 : correction;
        const __m512i corrections[2] = {_mm512_set1_epi32(static_cast<int32_t>(upper)),
                                        _mm512_set1_epi32(static_cast<int32_t>(correction - 256 * upper))};
        for (int i = 0; i < 4; ++i) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0][i], corrections[0]));
            if constexpr (T == 2) {
                const __m512 lower = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[1][i], corrections[1]));
                value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), lower);
            }
            total[i] = _mm512_fmadd_ps(value, _mm512_set1_ps(d.step), total[i]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 rows = _mm512_mul_ps(total[i], _mm512_set1_ps(powers.unit()));
        float* to = out + 32 * (i / 2) + 8 * (i % 2);
        _mm256_storeu_ps(to, _mm512_castps512_ps256(rows));
        _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(rows, 1));
    }
}

void look_up_groups(const uint8_t* tiles, const PlaneSet& planes, int64_t blocks, int bytes, const uint8_t* tables,
                    const TableBlock* descriptions, float* out) {
    (bytes == 2 ? look_up_groups<2> : look_up_groups<1>)(tiles, planes, blocks, tables, descriptions, out);
}

// Eight planes of one byte are a matrix of 8 x 8 bits, whose product with the unit vectors is its transpose: the four
// weights of a row, and those of the row 8 below.
template <bool Upper>
void unpack_matrices(const uint8_t* const* planes, int groups, uint8_t* panel) {
    const __m512i order[2] = {_mm512_load_si512(kOrders.unpack[0]), _mm512_load_si512(kOrders.unpack[1])};
    const __m512i rows = _mm512_load_si512(kOrders.rows);
    const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
    for (int g = 0; g < groups; ++g, panel += kTileRows * kGroup) {
        const auto load = [&](int position) {
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(planes[position] + g * kGroupBytes));
        };
        const auto pair = [&](int position) {
            return _mm512_inserti64x4(_mm512_castsi256_si512(load(position)), load(position + 1), 1);
        };
        const __m512i low[2] = {pair(0), pair(2)};
        const __m512i high[2] = {Upper ? pair(4) : low[0], Upper ? pair(6) : low[1]};
        for (int half = 0; half < 2; ++half) {
            // Byte k of four planes in 32 bits.
            const __m512i lower = _mm512_permutex2var_epi8(low[0], order[half], low[1]);
            const __m512i upper =
                Upper ? _mm512_permutex2var_epi8(high[0], order[half], high[1]) : _mm512_setzero_si512();
            const auto store = [&](int vector, __m512i matrices) {
                const __m512i weights = _mm512_gf2p8affine_epi64_epi8(units, matrices, 0);
                _mm512_store_si512(panel + 64 * vector, _mm512_permutexvar_epi32(rows, weights));
            };
            store(2 * half, _mm512_unpacklo_epi32(upper, lower));
            store(2 * half + 1, _mm512_unpackhi_epi32(upper, lower));
        }
    }
}

void unpack_by_matrices(const uint8_t* tile, const Slice& slice, int groups, uint8_t* panel) {
    alignas(64) static const uint8_t zeros[kPlaneBytes] = {};
    const uint8_t* planes[8];
    for (int position = 0; position < 8; ++position) {
        const int plane = slice.planes[position];
        planes[position] = plane < 0 ? zeros : tile + plane * kPlaneBytes;
    }
    (slice.bits > 4 ? unpack_matrices<true> : unpack_matrices<false>)(planes, groups, panel);
}

constexpr BitserialKernels with_shuffles(BitserialKernels kernels) {
    kernels.look_up = look_up_groups;
    kernels.unpack = unpack_by_matrices;
    return kernels;
}

}  // namespace

const BitserialKernels kAvx512VbmiBitserial = with_shuffles(kBitserial);

}  // namespace csq::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
