// Products with packed weights on the processor. Arguments were checked by the caller; nothing here allocates.
#pragma once

#include <cstdint>

#include "core/bitserial.h"

namespace csq::cpu {

// W = step * z of shape [rows, columns] in the tiles of core/bitserial.h.
struct PackedWeight {
    int64_t rows;
    int64_t columns;
    PlaneSet planes;
    const uint8_t* tiles;
    const float* step;  // [1] or [rows]
    bool step_per_row;
    const float* bias;  // [rows] or null
};

// Most columns of a convolution for which every sum of products of two bytes fits 32 bits.
constexpr int64_t kMostConvColumns = int64_t{1} << 16;
static_assert(kMostConvColumns * 128 * 128 < int64_t{1} << 31);

// Pairs are {height, width}: input [batch, channels, height, width], output [batch, rows, out_height, out_width].
// The columns of the weight are kernel row, kernel column, channel, the channels filled up to a multiple of 4.
struct Convolution {
    int64_t batch, channels;
    int64_t size[2], kernel[2], stride[2], padding[2], dilation[2], out[2];
};

int64_t tiles_size(int64_t rows, int64_t columns, int planes);
// Between canonical planes, bit row * columns + column of a stream, and tiles. `order`, if not null, names the column
// of the stream for each of `columns` columns of the tiles, or -1 where there is none.
void tile_planes(const uint8_t* planes, int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns,
                 const PlaneSet& set, uint8_t* tiles, int threads);
void untile_planes(const uint8_t* tiles, int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns,
                   const PlaneSet& set, uint8_t* planes, int threads);

// output [outer, channels, inner] = step * z, one rounding each, from canonical planes; step [1] or [channels].
void weight_of_planes(const uint8_t* planes, int64_t outer, int64_t channels, int64_t inner, const PlaneSet& set,
                      const float* step, bool step_per_channel, float* output);
// The same from tiles, [rows, columns], the columns in their order; bias is not read.
void bitserial_weight(const PackedWeight& weight, float* output, int threads);

// output [batch, rows] = input [batch, columns] W^T + bias
void bitserial_linear(const PackedWeight& weight, Precision precision, int64_t batch, const float* input, float* output,
                      uint8_t* scratch, int threads);
int64_t bitserial_linear_scratch(const PackedWeight& weight, Precision precision, int64_t batch);
// Which of its ways that takes on the instruction set in use, in words.
const char* bitserial_linear_path(const PackedWeight& weight, Precision precision, int64_t batch);

void bitserial_conv2d(const PackedWeight& weight, Precision precision, const Convolution& convolution,
                      const float* input, float* output, uint8_t* scratch, int threads);
int64_t bitserial_conv2d_scratch(const PackedWeight& weight, Precision precision, const Convolution& convolution);

}  // namespace csq::cpu
