// The parts of a product with packed weights that each instruction set writes for itself.
#pragma once

#include <cstdint>

#include "core/bitserial.h"
#include "cpu/isa.h"

namespace csq::cpu {

// Planes whose exponents lie close enough for one byte a weight: byte = sum of 2^position over the planes, and z = sum
// over slices of 2^lowest * (byte - offset).
struct Slice {
    int32_t bits;       // positions, 1..8
    int32_t lowest;     // exponent of position 0
    int32_t offset;     // of the inverted planes of this slice
    int32_t planes[8];  // index of the plane at each position, -1 where there is none
};

// Quantized input of one block of columns: q = 256 * limbs[0] + limbs[1] for two limbs, else q = limbs[0].
struct InputBlock {
    int8_t* limbs[2];  // a byte a column each, the second null for one limb
    float step;
    int32_t sums[2];
};

// Its tables: 16 sums for each group, less the smallest one, of one byte or two, the upper one first:
// [some groups][byte][group][copies][16], of as many groups as a kernel reads at once. Of one byte for 64 columns, of
// two for 128.
struct TableBlock {
    float step;
    int64_t smallest;  // sum over the groups of the smallest sums
    int64_t sum;       // of q
};

// How a batch row, or an output position, finds its inputs: group g of a block at bases[m] + offsets[g].
template <class T>
struct Inputs {
    const T* const* bases;   // [batch]
    const int32_t* offsets;  // [groups]
    // Memory that will be read soon: so many bytes of it are asked for with each group, lest it be idle meanwhile.
    const uint8_t* ahead = nullptr;
    int64_t ahead_bytes = 0;
};

// Where sums of integer products go: to out[m][64] += factors[m] * (starts[m] + sum), or where `totals` is given, to
// totals[m][64] += sum.
struct Sums {
    const int32_t* starts;
    const float* factors;
    float* out;
    int32_t* totals;
};

constexpr int kMostTableCopies = 2;
constexpr int kPanelBytes = static_cast<int>(kTileRows * kTileColumns);

struct BitserialKernels {
    int slice_bits;    // most bits of a slice
    int table_copies;  // of each table of 16 bytes

    // One block of `count` inputs; what is missing of the block is 0.
    void (*quantize)(const float* x, int count, const Quantization& quantization, InputBlock& block);
    void (*fill_tables)(const InputBlock& block, int bytes, uint8_t* tables, TableBlock& description);
    // out[64] = sum over the blocks of columns of step * (z of the rows of one row of tiles) . q
    void (*look_up)(const uint8_t* tiles, const PlaneSet& planes, int64_t blocks, int bytes, const uint8_t* tables,
                    const TableBlock* descriptions, float* out);

    // panel[group][64 rows][4 columns] = the bytes of a slice, for an even number of groups.
    void (*unpack)(const uint8_t* tile, const Slice& slice, int groups, uint8_t* panel);
    // Sums of products over the groups, for 16 * row_vectors rows.
    void (*multiply)(const uint8_t* panel, int bits, int groups, int row_vectors, int64_t batch,
                     const Inputs<int8_t>& inputs, const Sums& sums);

    // floats[column][64 rows] = (or +=) 2^lowest * (byte - offset)
    void (*convert)(const uint8_t* panel, const Slice& slice, bool add, int groups, float* floats);
    // out[m][64] += floats . inputs
    void (*multiply_floats)(const float* floats, int groups, int row_vectors, int64_t batch,
                            const Inputs<float>& inputs, float* out);
    // The same from the bytes of the only slice that there is, out[m][64] += 2^lowest * (bytes - offset) . inputs, for
    // one batch row or two.
    void (*multiply_codes)(const uint8_t* panel, const Slice& slice, int groups, int row_vectors, int64_t batch,
                           const Inputs<float>& inputs, float* out);

    // Largest magnitude, NaN if any is not finite.
    float (*largest)(const float* x, int64_t count);
    // From one channel after the other to groups of 4: to[i][c] = from[c * stride + i], quantized or as it is, 0 where
    // there is no channel c; limbs[1] is null for one limb.
    void (*gather_bytes)(const float* from, int64_t stride, int channels, int64_t count, float inverse_step,
                         int8_t* const* limbs);
    void (*gather_floats)(const float* from, int64_t stride, int channels, int64_t count, float* to);
    // sums[i] += sum of from[i][4]
    void (*add_channels)(const int8_t* from, int64_t count, int32_t* sums);
    // to[r * to_stride + m] = steps[r] * from[m][r] + bias[r] for rows of 64 results; steps and bias have 64 entries.
    void (*store_transposed)(const float* from, int rows, int64_t count, const float* steps, const float* bias,
                             float* to, int64_t to_stride);
};

const BitserialKernels& bitserial_kernels(Isa isa);
extern const BitserialKernels kScalarBitserial;
#if defined(__x86_64__)
extern const BitserialKernels kAvx2Bitserial;
extern const BitserialKernels kAvx512Bitserial;
extern const BitserialKernels kAvx512VnniBitserial;
extern const BitserialKernels kAvx512VbmiBitserial;
#endif

}  // namespace csq::cpu
