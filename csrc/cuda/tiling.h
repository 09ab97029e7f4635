// How the blocks of a launch share a weight. Plain arithmetic on the shape, which the processor can check.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/host_device.h"

namespace csq::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMaxSteps = 8;
constexpr int kMaxRowSteps = 64;
// Blocks that fill a large device several times over: only beyond them does a thread take more than one step.
constexpr int64_t kEnoughBlocks = 2048;

// The weight as a matrix of outer * channels rows, each `vectors` accesses long. A slab is the least number of rows
// that holds every channel equally often and, where rows are short, fills a block. A block owns kThreads / lanes rows
// of a slab; a step takes its threads on along their rows, or, where a row needs but one, to the same rows of the next
// slab: a thread never leaves its channel. Everything follows from the shape, so that the order of sums does.
struct Tiling {
    int64_t rows;
    int64_t vectors;
    int64_t slab;  // rows
    uint32_t column_blocks;
    uint32_t slab_blocks;
    int32_t lanes;  // threads of a row, a power of two
    int32_t steps;
    bool along_rows;

    Tiling(int64_t outer, int64_t channels, int64_t inner, int width)
        : rows(outer * channels), vectors(inner / width), lanes(1) {
        while (lanes < kThreads && lanes < vectors) lanes *= 2;
        // Rather several rows in a block than more than an eighth of its threads without work.
        while (lanes > kWarp && rows > block_rows() && tiles() * lanes * 8 > vectors * 9) lanes /= 2;
        slab = channels * std::max<int64_t>(1, block_rows() / channels);
        slab_blocks = static_cast<uint32_t>((slab + block_rows() - 1) / block_rows());
        along_rows = tiles() > 1;
        const int64_t most =
            along_rows ? std::min<int64_t>(tiles(), kMaxSteps) : std::min<int64_t>(slabs(), kMaxRowSteps);
        steps = static_cast<int32_t>(std::clamp<int64_t>(slabs() * slab_blocks * tiles() / kEnoughBlocks, 1, most));
        column_blocks = static_cast<uint32_t>(along_rows ? (tiles() + steps - 1) / steps : 1);
    }

    CSQ_HD int block_rows() const { return kThreads / lanes; }
    CSQ_HD int row_steps() const { return along_rows ? 1 : steps; }
    CSQ_HD int column_steps() const { return along_rows ? steps : 1; }
    CSQ_HD int64_t stride() const { return along_rows ? lanes : slab * vectors; }
    CSQ_HD int64_t slabs() const { return (rows + slab - 1) / slab; }
    // Rows that are left when each block has added up the slabs that it went through; a multiple of the channels.
    CSQ_HD int64_t summed_rows() const { return (slabs() + row_steps() - 1) / row_steps() * slab; }
    int64_t tiles() const { return (vectors + lanes - 1) / lanes; }
    unsigned blocks() const { return static_cast<unsigned>(summed_rows() / slab * slab_blocks * column_blocks); }
    int64_t partials(int planes) const { return planes * summed_rows() * column_blocks; }
};

// What of the matrix a thread works on.
struct Place {
    int64_t first_row;   // of the block, in its first slab
    int64_t summed_row;  // which of the summed rows takes the sums of that row
    int32_t column_block;
    int32_t block_row;  // the thread's row among those of the block
    int32_t steps;
    int64_t at;  // of the first step, in vectors

    CSQ_HD Place(const Tiling& tiling, uint32_t block, int32_t thread) {
        const uint32_t row_block = block / tiling.column_blocks;
        const int64_t first = static_cast<int64_t>(row_block % tiling.slab_blocks) * tiling.block_rows();
        const int64_t walk = row_block / tiling.slab_blocks;
        column_block = static_cast<int32_t>(block % tiling.column_blocks);
        block_row = thread / tiling.lanes;
        first_row = walk * tiling.row_steps() * tiling.slab + first;
        summed_row = walk * tiling.slab + first;
        const int64_t row = first_row + block_row;
        const int64_t column =
            static_cast<int64_t>(column_block) * tiling.column_steps() * tiling.lanes + thread % tiling.lanes;
        at = row * tiling.vectors + column;
        // Past the last row of a slab begins what other blocks hold.
        steps = first + block_row < tiling.slab ? tiling.steps : 0;
        const auto outside = [&](int32_t step) {
            return tiling.along_rows ? row >= tiling.rows || column + step * tiling.lanes >= tiling.vectors
                                     : row + step * tiling.slab >= tiling.rows || column >= tiling.vectors;
        };
        while (steps > 0 && outside(steps - 1)) --steps;
    }
};

}  // namespace csq::cuda
