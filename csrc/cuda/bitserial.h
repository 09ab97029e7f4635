// Products with packed weights on a CUDA device. Arguments were checked by the caller; nothing here allocates or waits.
#pragma once

#include <cstdint>

#include "core/bitserial_decode.h"
#include "core/reconstruct.h"
#include "cuda/launch.h"

namespace csq::cuda {

// Input rows of one pass over the planes, and the distance of two blocks in input_steps.
constexpr int kPassRows = 16;

// How the input is multiplied: with fused multiply-adds, or by the tensor cores as halves or bytes.
enum class Arithmetic : int32_t { f32 = 0, f16 = 1, i8 = 2 };

// y = step * sum over the groups of 2^exponent (x code^T) + bias. `blocks` of 128 columns, which `input` is padded to.
struct BitserialLinear {
    int64_t batch;
    int64_t rows;
    int64_t blocks;
    int32_t planes;
    Arithmetic arithmetic;
    DType dtype;  // of the output
    bool step_per_row;

    const uint8_t* tiles;      // [rows / 32, blocks, 512 planes], rounded up
    const void* input;         // [batch, 128 blocks] in the type of the arithmetic, at a multiple of 16 bytes
    const float* input_steps;  // [batch / 16, blocks, 16], rounded up; null if each is 1
    const float* step;         // [1] or [rows]
    const float* bias;         // [rows] or null
    float* partial;            // [batch, rows], scratch; used where there is more than one group
    void* output;              // [batch, rows]
};

LaunchStatus bitserial_linear(const BitserialLinear& params, const PlaneGroup* groups, int count, Stream stream);

// The input of [batch, columns] in blocks of 128 columns: as integers (reference.quantize) in the order of bytes that
// the kernels read, or as halves times a power of two. Columns beyond the input are 0.
struct BitserialInput {
    int64_t batch;
    int64_t columns;
    DType dtype;
    Arithmetic arithmetic;  // i8, or f16

    const void* input;  // [batch, columns]
    void* prepared;     // [batch, 128 blocks]
    float* steps;       // [batch / 16, blocks, 16]
};

LaunchStatus bitserial_prepare(const BitserialInput& params, Stream stream);

// W = step * z, or z itself.
LaunchStatus bitserial_weight(const BitserialWeight& params, Stream stream);

}  // namespace csq::cuda
