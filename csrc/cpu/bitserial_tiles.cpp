// From bit streams to tiles, and back, and to the weight itself.
#include <algorithm>
#include <cstring>

#include "cpu/bitserial.h"

namespace csq::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the nibble of a row lies within the 32 bytes of a group; see the order of a plane.
int byte_of(int64_t row) { return static_cast<int>(16 * (row / 4 % 2) + 4 * (row / 16) + row % 4); }
int shift_of(int64_t row) { return row / 8 % 2 * 4; }

// Visit every bit of the weight that the tiles hold: visit(plane, bit of the stream, byte of the tiles, bit of the
// byte).
template <class Visit>
void for_each_row(int64_t rows, int64_t columns, int planes, int64_t first, int64_t last, const Visit& visit) {
    const int64_t blocks = ceil_div(columns, kTileColumns);
    for (int64_t row = first; row < std::min(rows, last); ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            const int64_t tile = row / kTileRows * blocks + column / kTileColumns;
            const int64_t within = column % kTileColumns / kGroup * kGroupBytes + byte_of(row % kTileRows);
            visit(row, column, tile * planes * kPlaneBytes + within, shift_of(row) + column % kGroup);
        }
    }
}

}  // namespace

int64_t tiles_size(int64_t rows, int64_t columns, int planes) {
    return ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) * planes * kPlaneBytes;
}

void tile_planes(const uint8_t* planes, int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns,
                 const PlaneSet& set, uint8_t* tiles, int threads) {
    std::memset(tiles, 0, tiles_size(rows, columns, set.count));
    const int64_t plane_bytes = ceil_div(rows * stream_columns, 8);
    const int64_t bands = ceil_div(rows, kTileRows);
#pragma omp parallel for num_threads(threads) schedule(static) if (bands > 1)
    for (int64_t band = 0; band < bands; ++band) {
        for_each_row(rows, columns, set.count, band * kTileRows, (band + 1) * kTileRows,
                     [&](int64_t row, int64_t column, int64_t byte, int bit) {
                         const int64_t from = order == nullptr ? column : order[column];
                         if (from < 0) return;
                         const int64_t at = row * stream_columns + from;
                         for (int p = 0; p < set.count; ++p) {
                             const int value =
                                 (planes[p * plane_bytes + at / 8] >> at % 8 & 1) ^ int { set.inverted[p] };
                             tiles[byte + p * kPlaneBytes] |= static_cast<uint8_t>(value << bit);
                         }
                     });
    }
}

void untile_planes(const uint8_t* tiles, int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns,
                   const PlaneSet& set, uint8_t* planes) {
    const int64_t plane_bytes = ceil_div(rows * stream_columns, 8);
    std::memset(planes, 0, set.count * plane_bytes);
    for_each_row(rows, columns, set.count, 0, rows, [&](int64_t row, int64_t column, int64_t byte, int bit) {
        const int64_t from = order == nullptr ? column : order[column];
        if (from < 0) return;
        const int64_t at = row * stream_columns + from;
        for (int p = 0; p < set.count; ++p) {
            const int value = (tiles[byte + p * kPlaneBytes] >> bit & 1) ^ int { set.inverted[p] };
            planes[p * plane_bytes + at / 8] |= static_cast<uint8_t>(value << at % 8);
        }
    });
}

void weight_of_planes(const uint8_t* planes, int64_t outer, int64_t channels, int64_t inner, const PlaneSet& set,
                      const float* step, bool step_per_channel, float* output) {
    const int64_t weights = outer * channels * inner, plane_bytes = ceil_div(weights, 8);
    for (int64_t byte = 0; byte < plane_bytes; ++byte) {
        int32_t codes[8] = {};
        for (int p = 0; p < set.count; ++p) {
            const int32_t coefficient = (set.inverted[p] ? -1 : 1) * (int32_t{1} << set.exponents[p]);
            const int bits = planes[p * plane_bytes + byte];
            for (int i = 0; i < 8; ++i) codes[i] += coefficient * (bits >> i & 1);
        }
        const int64_t first = 8 * byte, count = std::min<int64_t>(8, weights - first);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t channel = step_per_channel ? (first + i) / inner % channels : 0;
            output[first + i] = static_cast<float>(codes[i]) * step[channel];
        }
    }
}

}  // namespace csq::cpu
