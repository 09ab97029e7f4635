// Products with packed weights for any processor: the definition, without tables.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/bitserial_kernels.h"

namespace csq::cpu {
namespace {

void split(float value, bool two, int8_t& upper, int8_t& lower) {
    // A value that is not finite belongs to a step that is NaN; which integer stands for it does not matter.
    const int q = std::isfinite(value) ? static_cast<int>(std::nearbyint(value)) : 0;
    const int high = two ? (q + 128) >> 8 : q;
    upper = static_cast<int8_t>(high);
    lower = static_cast<int8_t>(q - 256 * high);
}

float largest(const float* x, int64_t count) {
    float most = 0.0f, wrong = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        most = std::max(most, std::fabs(x[i]));
        wrong += x[i] * 0.0f;
    }
    return wrong != 0.0f ? std::numeric_limits<float>::quiet_NaN() : most;
}

void quantize(const float* x, int count, const Quantization& quantization, InputBlock& block) {
    const float most = largest(x, count);
    float step = quantization.element > 0.0f || std::isnan(most) ? most / quantization.element : 0.0f;
    for (int g = 0; g < count && quantization.group > 0.0f; g += kGroup) {
        float size[kGroup] = {};
        for (int c = 0; c < std::min(kGroup, count - g); ++c) size[c] = std::fabs(x[g + c]);
        const float group = ((size[0] + size[1]) + (size[2] + size[3])) / quantization.group;
        if (group > step) step = group;
    }
    if (step < std::numeric_limits<float>::min()) step = 0.0f;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    const bool two = quantization.limbs == 2;
    block.step = step;
    block.sums[0] = block.sums[1] = 0;
    for (int i = 0; i < quantization.columns; ++i) {
        int8_t upper, lower;
        split(i < count && step > 0.0f ? x[i] * inverse : 0.0f, two, upper, lower);
        block.limbs[0][i] = upper;
        if (two) block.limbs[1][i] = lower;
        block.sums[0] += upper;
        block.sums[1] += lower;
    }
}

void unpack(const uint8_t* tile, const Slice& slice, int groups, uint8_t* panel) {
    for (int g = 0; g < groups; ++g) {
        for (int row = 0; row < kTileRows; ++row, panel += kGroup) {
            std::fill_n(panel, kGroup, uint8_t{0});
            const int at = 32 * g + 16 * (row / 4 % 2) + 4 * (row / 16) + row % 4;
            for (int position = 0; position < slice.bits; ++position) {
                if (slice.planes[position] < 0) continue;
                const int nibble = tile[slice.planes[position] * kPlaneBytes + at] >> (row / 8 % 2 * 4);
                for (int c = 0; c < kGroup; ++c) panel[c] |= static_cast<uint8_t>((nibble >> c & 1) << position);
            }
        }
    }
}

void multiply(const uint8_t* panel, int, int groups, int row_vectors, int64_t batch, const Inputs<int8_t>& inputs,
              const Sums& to) {
    for (int64_t m = 0; m < batch; ++m) {
        int32_t sums[kTileRows] = {};
        for (int g = 0; g < groups; ++g) {
            const int8_t* x = inputs.bases[m] + inputs.offsets[g];
            for (int r = 0; r < 16 * row_vectors; ++r) {
                const uint8_t* w = panel + (g * kTileRows + r) * kGroup;
                for (int c = 0; c < kGroup; ++c) sums[r] += w[c] * x[c];
            }
        }
        for (int r = 0; r < 16 * row_vectors; ++r) {
            if (to.totals != nullptr) {
                to.totals[m * kTileRows + r] += sums[r];
            } else {
                to.out[m * kTileRows + r] += to.factors[m] * static_cast<float>(to.starts[m] + sums[r]);
            }
        }
    }
}

void convert(const uint8_t* panel, const Slice& slice, bool add, int groups, float* floats) {
    const float unit = static_cast<float>(1 << slice.lowest);
    for (int g = 0; g < groups; ++g) {
        for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kGroup; ++c) {
                const float value = unit * static_cast<float>(panel[(g * kTileRows + r) * kGroup + c] - slice.offset);
                float& to = floats[(g * kGroup + c) * kTileRows + r];
                to = add ? to + value : value;
            }
        }
    }
}

void multiply_floats(const float* floats, int groups, int row_vectors, int64_t batch, const Inputs<float>& inputs,
                     float* out) {
    for (int64_t m = 0; m < batch; ++m) {
        double sums[kTileRows] = {};
        for (int i = 0; i < groups * kGroup; ++i) {
            const double x = inputs.bases[m][inputs.offsets[i / kGroup] + i % kGroup];
            for (int r = 0; r < 16 * row_vectors; ++r) sums[r] += floats[i * kTileRows + r] * x;
        }
        for (int r = 0; r < 16 * row_vectors; ++r) out[m * kTileRows + r] += static_cast<float>(sums[r]);
    }
}

void gather_bytes(const float* from, int64_t stride, int channels, int64_t count, float inverse_step,
                  int8_t* const* limbs) {
    const bool two = limbs[1] != nullptr;
    for (int64_t i = 0; i < count; ++i) {
        for (int c = 0; c < kGroup; ++c) {
            int8_t upper, lower;
            split(c < channels ? from[c * stride + i] * inverse_step : 0.0f, two, upper, lower);
            limbs[0][kGroup * i + c] = upper;
            if (two) limbs[1][kGroup * i + c] = lower;
        }
    }
}

void gather_floats(const float* from, int64_t stride, int channels, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        for (int c = 0; c < kGroup; ++c) to[kGroup * i + c] = c < channels ? from[c * stride + i] : 0.0f;
    }
}

void add_channels(const int8_t* from, int64_t count, int32_t* sums) {
    for (int64_t i = 0; i < count; ++i) {
        for (int c = 0; c < kGroup; ++c) sums[i] += from[kGroup * i + c];
    }
}

void store_transposed(const float* from, int rows, int64_t count, const float* steps, const float* bias, float* to,
                      int64_t to_stride) {
    for (int r = 0; r < rows; ++r) {
        for (int64_t m = 0; m < count; ++m) to[r * to_stride + m] = from[m * kTileRows + r] * steps[r] + bias[r];
    }
}

}  // namespace

const BitserialKernels kScalarBitserial = {
    8,       0,       quantize,     nullptr,       nullptr,      unpack,           multiply, convert, multiply_floats,
    nullptr, largest, gather_bytes, gather_floats, add_channels, store_transposed,
};

}  // namespace csq::cpu
