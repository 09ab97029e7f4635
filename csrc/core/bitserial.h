// Products with packed weights, W = step * z with z = sum_j |k_j| b_j - offset: the arguments, and the order of the
// bits.
#pragma once

#include <cstdint>

namespace csq {

// 16 bits and a sign; an exponent occurs once, so they stay below this too.
constexpr int kMaxWeightPlanes = 17;

// The processor's order of the planes. A tile holds 64 rows and 128 columns, one plane after the other, the most
// significant first; tiles follow each other by column, then by row. Within a plane, 1 KiB:
//
//   byte 32 g + 16 b + 4 i + q, with group g = 0..31, b = 0..1, i = 0..3, q = 0..3
//     bits 0..3   columns 4 g .. 4 g + 3 of row 16 i + 4 b + q
//     bits 4..7   columns 4 g .. 4 g + 3 of row 16 i + 4 b + q + 8
//
// A nibble is the index into a table of the 16 sums of 4 inputs. Interleaving the bytes of 4 columns gives vectors
// whose 32-bit lanes are rows, 16 i + 0 .. 16 i + 15 in order. Planes with a negative coefficient are stored inverted.
// Rows and columns beyond the weight are zero bits.
constexpr int64_t kTileRows = 64;
constexpr int64_t kTileColumns = 128;
constexpr int64_t kPlaneBytes = kTileRows * kTileColumns / 8;
constexpr int kGroup = 4;
constexpr int kGroups = kTileColumns / kGroup;
constexpr int64_t kGroupBytes = kPlaneBytes / kGroups;

struct PlaneSet {
    int32_t count;
    int32_t exponents[kMaxWeightPlanes];  // falling
    bool inverted[kMaxWeightPlanes];      // its coefficient is negative
};

// exact: float32 products and sums. high, int8: the input as integers of two bytes or one, and a step.
enum class Precision : int32_t { exact = 0, high = 1, int8 = 2 };

// How a block of inputs becomes integers: step = max(max |x| / element, max over groups of sum |x| / group), where 0
// stands for no limit, and q = round(x / step) = 256 * upper + lower in so many limbs.
struct Quantization {
    float element;
    float group;
    int limbs;
    int columns;  // of a block
};

// Up to so many rows of input, tables of the sums over a group serve instead of products.
constexpr int64_t kTableBatch = 2;

constexpr Quantization quantization_of(Precision precision, int64_t batch) {
    const bool two = precision == Precision::high, tables = batch <= kTableBatch;
    // The sums over any part of a group, less the smallest of them, fit one byte or two. An int8 element alone may then
    // reach 255, so it takes two limbs where there are no tables; its blocks are half as long, because a limit on
    // groups is met by fewer of them.
    if (tables) return two ? Quantization{32639.0f, 65533.0f, 2, 128} : Quantization{0.0f, 253.0f, 2, 64};
    return two ? Quantization{32639.0f, 0.0f, 2, 128} : Quantization{127.0f, 0.0f, 1, 128};
}
static_assert(253 + kGroup / 2 == 255 && 65533 + kGroup / 2 == 65535, "rounding adds at most a half to each of four");
static_assert(32639 == 127 * 256 + 127, "the upper limb, rounded, is at most 127");

}  // namespace csq
