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

// Where up to 4 columns of a row, the group of one nibble, lie in a stream of bits: side by side, or one by one in an
// order of their own.
struct Group {
    int64_t row;             // its first bit in the stream
    int64_t first;           // column of the tiles
    const int32_t* columns;  // those of the stream, -1 where there is none; null: `first` and so on
    int count;
    int present;  // bit c: there is a column c

    Group(int64_t row_start, int64_t first_column, int64_t all_columns, const int32_t* order)
        : row(row_start),
          first(first_column),
          columns(order == nullptr ? nullptr : order + first_column),
          count(static_cast<int>(std::min<int64_t>(kGroup, all_columns - first_column))),
          present((1 << count) - 1) {
        for (int c = 0; c < count && columns != nullptr; ++c) present &= ~((columns[c] < 0) << c);
    }
    int read(const uint8_t* stream) const {
        int nibble = 0;
        if (columns == nullptr) {
            const int64_t at = row + first;
            const int shift = static_cast<int>(at % 8);
            nibble = stream[at / 8] >> shift;
            if (shift + count > 8) nibble |= stream[at / 8 + 1] << (8 - shift);
            return nibble & present;
        }
        for (int c = 0; c < count; ++c) {
            if (columns[c] < 0) continue;
            const int64_t at = row + columns[c];
            nibble |= (stream[at / 8] >> at % 8 & 1) << c;
        }
        return nibble;
    }
    // Into zero bits.
    void write(int nibble, uint8_t* stream) const {
        nibble &= present;
        if (columns == nullptr) {
            const int64_t at = row + first;
            const int shift = static_cast<int>(at % 8);
            stream[at / 8] |= static_cast<uint8_t>(nibble << shift);
            if (shift + count > 8) stream[at / 8 + 1] |= static_cast<uint8_t>(nibble >> (8 - shift));
            return;
        }
        for (int c = 0; c < count; ++c) {
            if (columns[c] < 0) continue;
            const int64_t at = row + columns[c];
            stream[at / 8] |= static_cast<uint8_t>((nibble >> c & 1) << at % 8);
        }
    }
};

// Visit every nibble of the weight that the tiles hold: visit(group, byte of the tiles in their first plane, shift
// within it). The rows of different tiles share no byte of a stream, so threads may write it.
template <class Visit>
void for_each_group(int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns, int planes,
                    int threads, const Visit& visit) {
    const int64_t blocks = ceil_div(columns, kTileColumns), bands = ceil_div(rows, kTileRows);
    static_assert(kTileRows % 8 == 0);
#pragma omp parallel for num_threads(threads) schedule(static) if (bands > 1)
    for (int64_t band = 0; band < bands; ++band) {
        for (int64_t row = band * kTileRows; row < std::min(rows, (band + 1) * kTileRows); ++row) {
            for (int64_t column = 0; column < columns; column += kGroup) {
                const int64_t tile = band * blocks + column / kTileColumns;
                const int64_t within = column % kTileColumns / kGroup * kGroupBytes + byte_of(row % kTileRows);
                visit(Group(row * stream_columns, column, columns, order), tile * planes * kPlaneBytes + within,
                      shift_of(row));
            }
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
    for_each_group(
        rows, stream_columns, order, columns, set.count, threads, [&](const Group& group, int64_t byte, int shift) {
            for (int p = 0; p < set.count; ++p) {
                const int nibble = group.read(planes + p * plane_bytes) ^ (set.inverted[p] ? group.present : 0);
                tiles[byte + p * kPlaneBytes] |= static_cast<uint8_t>(nibble << shift);
            }
        });
}

void untile_planes(const uint8_t* tiles, int64_t rows, int64_t stream_columns, const int32_t* order, int64_t columns,
                   const PlaneSet& set, uint8_t* planes, int threads) {
    const int64_t plane_bytes = ceil_div(rows * stream_columns, 8);
    std::memset(planes, 0, set.count * plane_bytes);
    for_each_group(rows, stream_columns, order, columns, set.count, threads,
                   [&](const Group& group, int64_t byte, int shift) {
                       for (int p = 0; p < set.count; ++p) {
                           const int nibble = tiles[byte + p * kPlaneBytes] >> shift;
                           group.write(set.inverted[p] ? ~nibble : nibble, planes + p * plane_bytes);
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
