// From words of planes to the operands of matrix instructions, on the device and, for the tests, on the processor.
// backends/gpu_planes.py draws the order of the bits.
#pragma once

#include <cstdint>

#include "core/host_device.h"

#if defined(__CUDACC__)
#define CSQ_UNROLL _Pragma("unroll")
#else
#define CSQ_UNROLL
#endif

namespace csq {

constexpr int kWarpRows = 32;
constexpr int kWarpColumns = 128;
constexpr int kLaneRows = 4;
constexpr int kLaneColumns = 32;
constexpr int kMaxGroupPlanes = 8;
constexpr int kPlaneTileBytes = kWarpRows * kWarpColumns / 8;
// A lane's columns are taken in 8 positions of 4; position p is column 4 p.
constexpr int kPositions = 8;

// Bits of a field that can hold the codes of so many planes and divides a byte.
CSQ_HD constexpr int field_bits(int planes) { return planes <= 1 ? 1 : planes <= 2 ? 2 : planes <= 4 ? 4 : 8; }

// The word that has value in every field of so many bits.
CSQ_HD constexpr uint32_t in_every(int bits, uint32_t value) {
    return bits >= 32 ? value : in_every(2 * bits, value | value << bits);
}

// Turns K planes of 32 columns, the least significant first, into field_bits(K) words of 32 / field_bits(K) whole
// codes: the field at bit F i of byte b of fields[q] holds the code at position F i + q. A shift and a select for a
// word and a doubling of the field; what is known to be zero costs nothing.
template <int K>
CSQ_HD void merge_planes(const uint32_t* planes, uint32_t (&fields)[field_bits(K)]) {
    constexpr int F = field_bits(K);
    CSQ_UNROLL
    for (int j = 0; j < F; ++j) fields[j] = j < K ? planes[j] : 0;
    CSQ_UNROLL
    for (int f = 1; f < F; f *= 2) {
        const uint32_t low = in_every(2 * f, (1u << f) - 1);
        CSQ_UNROLL
        for (int j = 0; j < F; ++j) {
            if (j & f) continue;
            const uint32_t a = fields[j], b = fields[j + f];
            fields[j] = (a & low) | ((b << f) & ~low);
            fields[j + f] = ((a >> f) & low) | (b & ~low);
        }
    }
}

// Codes at position p as 4 unsigned bytes.
template <int K>
CSQ_HD uint32_t byte_operand(const uint32_t (&fields)[field_bits(K)], int p) {
    constexpr int F = field_bits(K);
    return (fields[p % F] >> (p / F * F)) & in_every(8, (1u << F) - 1);
}

// A code v in the low bits of a half is the subnormal number v 2^-24. One that starts higher counts for more, and adds
// to an accumulator of its own, so that masks go without shifts: there are S such sets. Of 8 rows of the input each has
// 8 registers, of 16 rows 16, where more than 2 sets leave room for one block alone.
constexpr int kSubnormalExponent = 24;
CSQ_HD constexpr int half_sets(int planes, int input_rows) {
    return field_bits(planes) <= 2 && input_rows <= 8 ? 4 : field_bits(planes) <= 4 ? 2 : 1;
}

template <int K, int S>
CSQ_HD int half_set(int p) {
    return p / field_bits(K) % S;
}

// Codes at position p as two pairs of halves, columns 0, 1 and 2, 3, times 2^(F s - 24), s = half_set(p).
template <int K, int S>
CSQ_HD void half_operand(const uint32_t (&fields)[field_bits(K)], int p, uint32_t (&pairs)[2]) {
    constexpr int F = field_bits(K);
    const int at = p / F * F;
    const int window = at / (F * S) * (F * S);
    const uint32_t mask = in_every(16, (1u << F) - 1) << (at - window);
    pairs[0] = (fields[p % F] >> window) & mask;
    pairs[1] = (fields[p % F] >> (window + 8)) & mask;
}

// Minus the offset of a group, at the unit of set 0, in both halves.
CSQ_HD uint32_t half_offset(int offset) { return 0x80008000u | static_cast<uint32_t>(offset) * 0x00010001u; }

// The 16-row operands of m16n8k16 for a tile: calls multiply(p, m, set, a) for every position p and both halves m of
// the rows. The 8-column operand at p is words 2 p and 2 p + 1 of the lane's 32 columns of halves.
template <int K, int S, class Multiply>
CSQ_HD void half_products(const uint32_t* words, Multiply&& multiply) {
    CSQ_UNROLL
    for (int m = 0; m < 2; ++m) {
        uint32_t upper[field_bits(K)], lower[field_bits(K)];
        merge_planes<K>(words + 2 * m * K, upper);
        merge_planes<K>(words + (2 * m + 1) * K, lower);
        CSQ_UNROLL
        for (int p = 0; p < kPositions; ++p) {
            uint32_t u[2], l[2];
            half_operand<K, S>(upper, p, u);
            half_operand<K, S>(lower, p, l);
            const uint32_t a[4] = {u[0], l[0], u[1], l[1]};
            multiply(p, m, half_set<K, S>(p), a);
        }
    }
}

// The same for m16n8k32 on bytes: multiply(s, m, a) for every pair s of positions. The 8-column operand is words 2 s
// and 2 s + 1 of the lane's 32 columns of bytes, in each word the columns 0, 2, 1, 3.
template <int K, class Multiply>
CSQ_HD void byte_products(const uint32_t* words, Multiply&& multiply) {
    CSQ_UNROLL
    for (int m = 0; m < 2; ++m) {
        uint32_t upper[field_bits(K)], lower[field_bits(K)];
        merge_planes<K>(words + 2 * m * K, upper);
        merge_planes<K>(words + (2 * m + 1) * K, lower);
        CSQ_UNROLL
        for (int s = 0; s < kPositions / 2; ++s) {
            const uint32_t a[4] = {byte_operand<K>(upper, 2 * s), byte_operand<K>(lower, 2 * s),
                                   byte_operand<K>(upper, 2 * s + 1), byte_operand<K>(lower, 2 * s + 1)};
            multiply(s, m, a);
        }
    }
}

// Place of column c, 0..3, of a position in its word of bytes.
CSQ_HD int byte_of_column(int c) { return c == 1 ? 2 : c == 2 ? 1 : c; }

// Byte b of a word, 0..255, plus 2^23, as a float.
CSQ_HD float biased_float(uint32_t word, int b) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + static_cast<uint32_t>(b)));
#else
    return 8388608.0f + static_cast<float>((word >> (8 * b)) & 0xffu);
#endif
}

// acc[r][n] += sum over the lane's columns of (code - offset) x, in float32. load(p, n) returns 4 columns of input row
// n.
template <int K, int N, class Load>
CSQ_HD void float_products(const uint32_t* words, int offset, Load&& load, float (&acc)[kLaneRows][N]) {
    uint32_t fields[kLaneRows][field_bits(K)];
    CSQ_UNROLL
    for (int r = 0; r < kLaneRows; ++r) merge_planes<K>(words + r * K, fields[r]);
    const float bias = 8388608.0f + static_cast<float>(offset);
    CSQ_UNROLL
    for (int p = 0; p < kPositions; ++p) {
        float x[N][4];
        CSQ_UNROLL
        for (int n = 0; n < N; ++n) load(p, n, x[n]);
        CSQ_UNROLL
        for (int r = 0; r < kLaneRows; ++r) {
            const uint32_t codes = byte_operand<K>(fields[r], p);
            CSQ_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float z = biased_float(codes, byte_of_column(c)) - bias;
                CSQ_UNROLL
                for (int n = 0; n < N; ++n) acc[r][n] = fmaf(z, x[n][c], acc[r][n]);
            }
        }
    }
}

}  // namespace csq
