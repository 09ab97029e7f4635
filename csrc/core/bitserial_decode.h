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
    int64_t first;    // in the flat weight
    int64_t channel;  // of the first
    int32_t count;    // of them within the weight
    float value[kLaneColumns];
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

// Where the item lies in the weight; for tiles within a row, or nowhere.
template <bool kTiled>
CSQ_HD void place_item(const BitserialWeight& p, int64_t item, WeightItem& made) {
    const int64_t rows = p.outer * p.channels;
    int64_t end = rows * p.inner;
    made.first = item * kLaneColumns;
    made.channel = p.step_per_channel ? made.first / p.inner % p.channels : 0;
    if (kTiled) {
        const uint32_t tile = static_cast<uint32_t>(item / (32 * kLaneRows)), blocks = static_cast<uint32_t>(p.blocks);
        const int lane = static_cast<int>(item % 32), r = static_cast<int>(item / 32 % kLaneRows);
        const int64_t row = static_cast<int64_t>(tile / blocks) * kWarpRows + 8 * r + lane / 4;
        made.first = row < rows ? row * p.inner + tile % blocks * kWarpColumns + lane % 4 * kLaneColumns : end;
        made.channel = p.step_per_channel && p.channels > 1 ? row : 0;
        if (row < rows) end = (row + 1) * p.inner;
    }
    const int64_t left = end - made.first;
    made.count = static_cast<int32_t>(left < 0 ? 0 : left < kLaneColumns ? left : kLaneColumns);
}

// kByte: every exponent is below 8, and a byte of the fields is the whole code.
template <bool kTiled, bool kByte>
CSQ_HD void make_weights(const BitserialWeight& p, int64_t item, int offset, WeightItem& made) {
    place_item<kTiled>(p, item, made);
    int32_t code[kLaneColumns];
    CSQ_UNROLL
    for (int i = 0; i < kLaneColumns; ++i) code[i] = -offset;
    for (int plane = 0; plane < p.planes;) {
        // Planes whose exponents agree but for 3 bits, whichever of them there are.
        const int base = kByte ? 0 : p.exponents[plane] / 8 * 8;
        uint32_t words[8] = {}, fields[8];
        CSQ_UNROLL
        for (int e = 7; e >= 0; --e) {
            if (plane < p.planes && p.exponents[plane] == base + e) words[e] = plane_word<kTiled>(p, item, plane++);
        }
        merge_planes<8>(words, fields);
        CSQ_UNROLL
        for (int i = 0; i < kLaneColumns; ++i) {
            const uint32_t field = fields[kTiled ? i / 4 : i % 8];
            const int byte = kTiled ? byte_of_column(i % 4) : i / 8;
            if (kByte) {
                made.value[i] = biased_float(field, byte) - (8388608.0f + static_cast<float>(offset));
            } else {
                code[i] += static_cast<int32_t>((field >> (8 * byte)) & 0xffu) << base;
            }
        }
    }
    CSQ_UNROLL
    for (int i = 0; i < kLaneColumns && !kByte; ++i) made.value[i] = static_cast<float>(code[i]);
    if (p.step == nullptr) return;
    if (kTiled || !p.step_per_channel) {
        // Past the last row there is no step either.
        const float step = made.count > 0 ? p.step[made.channel] : 0.0f;
        CSQ_UNROLL
        for (int i = 0; i < kLaneColumns; ++i) made.value[i] *= step;
        return;
    }
    int64_t channel = made.channel, within = made.first % p.inner;
    CSQ_UNROLL
    for (int i = 0; i < kLaneColumns; ++i) {
        made.value[i] *= p.step[channel];
        if (++within < p.inner) continue;
        within = 0;
        channel = channel + 1 == p.channels ? 0 : channel + 1;
    }
}

CSQ_HD int32_t total_offset(const BitserialWeight& p) {
    int32_t offset = 0;
    for (int i = 0; i < p.planes; ++i) offset += p.inverted[i] ? 1 << p.exponents[i] : 0;
    return offset;
}

}  // namespace csq
