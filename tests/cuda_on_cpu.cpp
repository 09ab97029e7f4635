// What the CUDA kernels compute with, as functions of arrays for the processor; test_cuda_on_cpu.py compiles and judges
// them. The device's approximate instructions are modelled by exact results, moved by as many units in the last place as
// their documentation allows, at random.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

#include "core/half.h"
#include "core/soft_bits.h"
#include "cuda/tiling.h"

namespace {

std::mt19937 generator;

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float moved(float x, int most) {
    const int ulps = std::uniform_int_distribution<int>(-most, most)(generator);
    if (x == 0.0f || !std::isfinite(x)) return x;
    const float y = csq::bits_float(csq::float_bits(x) + static_cast<uint32_t>(ulps));
    return std::isnan(y) ? std::copysign(INFINITY, x) : y;
}

struct Instructions {
    static float exp2(float x) {
        return flushed(moved(flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(x))))), 2));
    }
    static float reciprocal(float x) {
        int exponent;
        const bool power_of_two = std::frexp(x, &exponent) == 0.5f;
        return flushed(moved(flushed(1.0f / x), power_of_two ? 0 : 1));
    }
    static float smaller(float x, float y) { return x < y || std::isnan(x) ? x : y; }
    static float fma(float x, float y, float z) { return std::fma(x, y, z); }
};

}  // namespace

extern "C" {

void seed(uint32_t value) { generator.seed(value); }

void digits(int64_t count, float temperature, const float* positive, const float* negative, float* result) {
    const float rate = csq::exponent_rate(temperature);
    for (int64_t i = 0; i < count; ++i) result[i] = csq::digit<Instructions>(positive[i], negative[i], rate);
}

void soft_bits(int64_t count, float temperature, const float* logits, float* bits, float* slopes) {
    const float rate = csq::exponent_rate(temperature);
    for (int64_t i = 0; i < count; ++i) {
        bits[i] = csq::soft_bit<Instructions>(logits[i], rate);
        slopes[i] = csq::soft_bit_slope<Instructions>(bits[i]);
    }
}

// sizes: blocks, accesses of the weight, summed rows, column blocks.
void tile(int64_t outer, int64_t channels, int64_t inner, int width, int64_t* sizes) {
    const csq::cuda::Tiling tiling(outer, channels, inner, width);
    const int64_t values[] = {tiling.blocks(), tiling.rows * tiling.vectors, tiling.summed_rows(),
                              tiling.column_blocks};
    for (const int64_t value : values) *sizes++ = value;
}

// Walks through blocks as their threads do. least and most: the range of the accesses. visits counts each of them, slots
// each block that puts a sum into [summed rows, column blocks], if they are not null. Returns how often a thread met
// another channel than that of its sum.
int64_t walk(int64_t outer, int64_t channels, int64_t inner, int width, uint32_t first_block, uint32_t last_block,
             int64_t* least, int64_t* most, int32_t* visits, int32_t* slots) {
    const csq::cuda::Tiling tiling(outer, channels, inner, width);
    int64_t strays = 0;
    for (uint32_t block = first_block; block <= last_block; ++block) {
        for (int32_t thread = 0; thread < csq::cuda::kThreads; ++thread) {
            const csq::cuda::Place place(tiling, block, thread);
            const int64_t summed_row = place.summed_row + place.block_row;
            int64_t at = place.at;
            for (int32_t step = 0; step < place.steps; ++step, at += tiling.stride()) {
                *least = std::min(*least, at);
                *most = std::max(*most, at);
                if (visits != nullptr) ++visits[at];
                strays += at / tiling.vectors % channels != summed_row % channels;
            }
            const bool leads = place.steps > 0 && thread % tiling.lanes == 0;
            if (slots != nullptr && leads) ++slots[summed_row * tiling.column_blocks + place.column_block];
        }
    }
    return strays;
}
}
