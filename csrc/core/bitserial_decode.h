// Codes of the weight from canonical planes or from tiles, 32 at a time.
#pragma once

#include "core/bitserial_words.h"
#include "core/reconstruct.h"

namespace csq {

constexpr int kMaxWeightPlanes = 17;

// Up to 8 planes of adjacent exponents: code = unsigned number - offset, in units of 2^exponent.
struct PlaneGroup {
    int32_t first;  // of its planes within a tile
    int32_t planes;
    int32_t exponent;
    int32_t offset;
};

// Where the weight W = step * z, or z itself, comes from: canonical planes or tiles.
struct BitserialWeight {
    int64_t outer;  // the weight as [outer, channels, inner]; tiles: [rows, 1, columns] or [1, rows, columns]
    int64_t channels;
    int64_t inner;
    int64_t plane_bytes;  // distance of two canonical planes
    int64_t blocks;       // of 128 columns; 0 for canonical planes
    int32_t planes;
    int32_t exponents[kMaxWeightPlanes];  // falling
    bool inverted[kMaxWeightPlanes];      // its coefficient is negative
    PlaneGroup group_of[kMaxWeightPlanes];
    DType dtype;  // of the output
    bool step_per_channel;

    const uint8_t* source;
    const float* step;  // [1] or [channels], or null for z
    void* output;
};

// The 32 weights that a thread makes: a word of a flat plane, or a row of a lane of a tile.
struct WeightItem {
    int64_t first;  // in the flat weight
    int32_t count;  // of them within the weight
    int32_t code[kLaneColumns];
};

CSQ_HD int64_t weight_items(const BitserialWeight& p) {
    const int64_t rows = p.outer * p.channels;
    if (p.blocks > 0) return (rows + kWarpRows - 1) / kWarpRows * p.blocks * kWarpRows * 4;
    return (rows * p.inner + kLaneColumns - 1) / kLaneColumns;
}

template <bool kTiled>
CSQ_HD uint32_t plane_word(const BitserialWeight& p, int64_t item, int plane) {
    if (kTiled) {
        const PlaneGroup& group = p.group_of[plane];
        const int lane = static_cast<int>(item % 32), r = static_cast<int>(item / 32 % kLaneRows);
        const int word = group.planes * r + p.exponents[plane] - group.exponent;
        const uint8_t* words = p.source + (item / (32 * kLaneRows) * p.planes + group.first) * kPlaneTileBytes;
        return *reinterpret_cast<const uint32_t*>(words + word / 4 * kPlaneTileBytes + lane * 16 + word % 4 * 4);
    }
    uint32_t word = 0;
    for (int b = 0; b < 4 && item * 4 + b < p.plane_bytes; ++b) {
        word |= static_cast<uint32_t>(p.source[plane * p.plane_bytes + item * 4 + b]) << (8 * b);
    }
    return p.inverted[plane] ? ~word : word;
}

template <bool kTiled>
CSQ_HD void make_codes(const BitserialWeight& p, int64_t item, int offset, WeightItem& made) {
    CSQ_UNROLL
    for (int i = 0; i < kLaneColumns; ++i) made.code[i] = -offset;
    for (int plane = 0; plane < p.planes;) {
        // Planes whose exponents agree but for 3 bits, whichever of them there are.
        const int base = p.exponents[plane] / 8 * 8;
        uint32_t words[8] = {}, fields[8];
        CSQ_UNROLL
        for (int e = 7; e >= 0; --e) {
            if (plane < p.planes && p.exponents[plane] == base + e) words[e] = plane_word<kTiled>(p, item, plane++);
        }
        merge_planes<8>(words, fields);
        CSQ_UNROLL
        for (int i = 0; i < kLaneColumns; ++i) {
            const int position = kTiled ? i / 4 : i % 8, byte = kTiled ? byte_of_column(i % 4) : i / 8;
            made.code[i] += static_cast<int32_t>((fields[position] >> (8 * byte)) & 0xffu) << base;
        }
    }
    int64_t end = p.outer * p.channels * p.inner;
    made.first = item * kLaneColumns;
    if (kTiled) {
        const int64_t tile = item / (32 * kLaneRows);
        const int lane = static_cast<int>(item % 32), r = static_cast<int>(item / 32 % kLaneRows);
        const int64_t row = tile / p.blocks * kWarpRows + 8 * r + lane / 4;
        made.first = row * p.inner + tile % p.blocks * kWarpColumns + lane % 4 * kLaneColumns;
        if (row >= p.outer * p.channels)
            made.first = end;
        else
            end = (row + 1) * p.inner;
    }
    const int64_t left = end - made.first;
    made.count = static_cast<int32_t>(left < 0 ? 0 : left < kLaneColumns ? left : kLaneColumns);
}

CSQ_HD float weight_of(const BitserialWeight& p, const WeightItem& made, int i) {
    const int64_t channel = p.step_per_channel ? (made.first + i) / p.inner % p.channels : 0;
    return static_cast<float>(made.code[i]) * (p.step == nullptr ? 1.0f : p.step[channel]);
}

CSQ_HD int32_t total_offset(const BitserialWeight& p) {
    int32_t offset = 0;
    for (int i = 0; i < p.planes; ++i) offset += p.inverted[i] ? 1 << p.exponents[i] : 0;
    return offset;
}

}  // namespace csq
