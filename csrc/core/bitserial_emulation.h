// cuda/bitserial.cu on the processor, thread by thread, with the operands that its header makes: shows
// without a GPU that they are what the matrix instructions expect, and what the order of the sums costs.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/bitserial_words.h"
#include "core/half.h"
#include "cuda/bitserial.h"

namespace csq {

constexpr int kLanes = 32;
constexpr int kBlockWarps = 8;
using Operand = std::array<std::array<uint32_t, 4>, kLanes>;

// Tensor cores add exact products to the accumulator and cut off what does not fit (Fasi et al., PeerJ CS 7:e330).
inline float truncated(double value) {
    const float nearest = static_cast<float>(value);
    return std::abs(static_cast<double>(nearest)) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline void accumulate(float& c, double sum) { c = truncated(static_cast<double>(c) + sum); }
inline void accumulate(int32_t& c, double sum) { c += static_cast<int32_t>(sum); }

struct HalfElements {
    static constexpr int kPerRegister = 2;
    static double a(uint32_t word, int i) { return to_float(f16{static_cast<uint16_t>(word >> (16 * i))}); }
    static double b(uint32_t word, int i) { return a(word, i); }
};
struct ByteElements {
    static constexpr int kPerRegister = 4;
    static double a(uint32_t word, int i) { return (word >> (8 * i)) & 0xffu; }
    static double b(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
};

// mma.sync m16n8k(8 E) of the PTX manual: the rows of A, the columns of B and C, and the order of k, by lane and
// register.
template <class E, class C>
void emulate_mma(C (&c)[16][8], const Operand& a, const uint32_t (&b)[kLanes][2]) {
    constexpr int kDepth = 8 * E::kPerRegister;
    double rows[16][kDepth], columns[kDepth][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < E::kPerRegister; ++i) {
            for (int half = 0; half < 2; ++half) {
                const int k = half * kDepth / 2 + t * E::kPerRegister + i;
                rows[g][k] = E::a(a[lane][2 * half], i);
                rows[g + 8][k] = E::a(a[lane][2 * half + 1], i);
                columns[k][g] = E::b(b[lane][half], i);
            }
        }
    }
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 8; ++n) {
            double sum = 0.0;
            for (int k = 0; k < kDepth; ++k) sum += rows[m][k] * columns[k][n];
            accumulate(c[m][n], sum);
        }
    }
}

// The words of every lane of a tile, in its accesses of 16 bytes.
template <int K>
void read_words(const uint8_t* tile, uint32_t (&words)[kLanes][kLaneRows * K]) {
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int v = 0; v < K; ++v) std::memcpy(&words[lane][4 * v], tile + (v * kLanes + lane) * 16, 16);
    }
}

// Rows of sums by input row.
using TileSums = float[kWarpRows][8];

// The accumulators of a warp for 8 of the rows of the input.
template <int K, int S>
struct HalfSums {
    int chains;
    float shift[2][16][8] = {}, codes[2][S][16][8] = {};

    void add(const uint8_t* tile, int offset, const uint32_t (&x)[kLanes][16]) {
        uint32_t words[kLanes][kLaneRows * K];
        read_words<K>(tile, words);
        Operand operands[kPositions][2], shift_operand;
        int sets[kPositions];
        for (int lane = 0; lane < kLanes; ++lane) {
            half_products<K, S>(words[lane], [&](int p, int m, int set, const uint32_t (&a)[4]) {
                std::copy(a, a + 4, operands[p][m][lane].begin());
                sets[p] = set;
            });
            shift_operand[lane].fill(half_offset(offset));
        }
        for (int p = 0; p < kPositions; ++p) {
            uint32_t b[kLanes][2];
            for (int lane = 0; lane < kLanes; ++lane) b[lane][0] = x[lane][2 * p], b[lane][1] = x[lane][2 * p + 1];
            emulate_mma<HalfElements>(shift[p % chains], shift_operand, b);
            for (int m = 0; m < 2; ++m) emulate_mma<HalfElements>(codes[m][sets[p]], operands[p][m], b);
        }
    }
    // Added to sums, times a step for each input row.
    void get(const float (&steps)[8], TileSums& sums) const {
        for (int row = 0; row < kWarpRows; ++row) {
            for (int n = 0; n < 8; ++n) {
                float sum = shift[0][row % 16][n] + shift[1][row % 16][n];
                for (int set = 0; set < S; ++set) {
                    sum = std::fmaf(std::ldexp(1.0f, -field_bits(K) * set), codes[row / 16][set][row % 16][n], sum);
                }
                sums[row][n] = std::fmaf(steps[n], sum, sums[row][n]);
            }
        }
    }
};

template <int K>
void emulate_bytes(const uint8_t* tile, int offset, const uint32_t (&x)[kLanes][16], const float (&steps)[8],
                   TileSums& sums) {
    uint32_t words[kLanes][kLaneRows * K];
    read_words<K>(tile, words);
    Operand operands[kPositions / 2][2], shift_operand;
    for (int lane = 0; lane < kLanes; ++lane) {
        byte_products<K>(words[lane], [&](int s, int m, const uint32_t (&a)[4]) {
            std::copy(a, a + 4, operands[s][m][lane].begin());
        });
        shift_operand[lane].fill(static_cast<uint32_t>(offset) * 0x01010101u);
    }
    int32_t shift[16][8] = {}, acc[2][16][8] = {};
    for (int s = 0; s < kPositions / 2; ++s) {
        uint32_t b[kLanes][2];
        for (int lane = 0; lane < kLanes; ++lane) b[lane][0] = x[lane][2 * s], b[lane][1] = x[lane][2 * s + 1];
        emulate_mma<ByteElements>(shift, shift_operand, b);
        for (int m = 0; m < 2; ++m) emulate_mma<ByteElements>(acc[m], operands[s][m], b);
    }
    for (int row = 0; row < kWarpRows; ++row) {
        for (int n = 0; n < 8; ++n) {
            const float sum = static_cast<float>(acc[row / 16][row % 16][n] - shift[row % 16][n]);
            sums[row][n] = std::fmaf(steps[n], sum, sums[row][n]);
        }
    }
}

// Sums of each quad's lanes, kept apart as the kernel keeps them until its end.
template <int K>
void emulate_floats(const uint8_t* tile, int offset, const float* const (&x)[8], int inputs,
                    float (&sums)[kLanes][kLaneRows][8]) {
    uint32_t words[kLanes][kLaneRows * K];
    read_words<K>(tile, words);
    for (int lane = 0; lane < kLanes; ++lane) {
        float acc[kLaneRows][8] = {};
        const auto load = [&](int p, int n, float (&four)[4]) {
            for (int c = 0; c < 4; ++c) four[c] = n < inputs ? x[n][lane % 4 * kLaneColumns + 4 * p + c] : 0.0f;
        };
        float_products<K, 8>(words[lane], offset, load, acc);
        for (int r = 0; r < kLaneRows; ++r) {
            for (int n = 0; n < 8; ++n) sums[lane][r][n] += acc[r][n];
        }
    }
}

template <int K, int S>
void emulate_group(const cuda::BitserialLinear& p, const PlaneGroup& group, int64_t tile_row, int64_t first_input,
                   float (&total)[kWarpRows][8]) {
    const bool halves = p.arithmetic == cuda::Arithmetic::f16, floats = p.arithmetic == cuda::Arithmetic::f32;
    const int64_t element = floats ? 4 : halves ? 2 : 1;
    float all[kWarpRows][8] = {};
    for (int warp = 0; warp < kBlockWarps; ++warp) {
        TileSums sums = {};
        float lane_sums[kLanes][kLaneRows][8] = {};
        HalfSums<K, S> accumulators{p.batch <= 8 ? 2 : 1};
        constexpr float kOnes[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
        for (int64_t block = warp; block < p.blocks; block += kBlockWarps) {
            const uint8_t* tile = p.tiles + ((tile_row * p.blocks + block) * p.planes + group.first) * kPlaneTileBytes;
            const uint8_t* columns = static_cast<const uint8_t*>(p.input) + block * kWarpColumns * element;
            uint32_t x[kLanes][16] = {};
            float steps[8];
            const float* floats_of[8] = {};
            int inputs = 0;
            for (int n = 0; n < 8 && first_input + n < p.batch; ++n, ++inputs) {
                const int64_t input = first_input + n;
                const uint8_t* row = columns + input * p.blocks * kWarpColumns * element;
                floats_of[n] = reinterpret_cast<const float*>(row);
                for (int t = 0; t < 4 && !floats; ++t) {
                    std::memcpy(x[4 * n + t], row + t * kLaneColumns * element, kLaneColumns * element);
                }
                const int64_t at = (input / cuda::kPassRows * p.blocks + block) * cuda::kPassRows;
                steps[n] = p.input_steps == nullptr ? 1.0f : p.input_steps[at + input % cuda::kPassRows];
            }
            for (int n = inputs; n < 8; ++n) steps[n] = 1.0f;
            if (floats) {
                emulate_floats<K>(tile, group.offset, floats_of, inputs, lane_sums);
            } else if (halves) {
                accumulators.add(tile, group.offset, x);
                if (p.input_steps == nullptr) continue;
                accumulators.get(steps, sums);
                accumulators = {accumulators.chains};
            } else {
                emulate_bytes<K>(tile, group.offset, x, steps, sums);
            }
        }
        accumulators.get(kOnes, sums);
        for (int row = 0; row < kWarpRows; ++row) {
            for (int n = 0; n < 8; ++n) {
                float sum = sums[row][n];
                if (floats) {
                    const auto of_lane = [&](int t) { return lane_sums[row % 8 * 4 + t][row / 8][n]; };
                    sum = (of_lane(0) + of_lane(1)) + (of_lane(2) + of_lane(3));
                }
                all[row][n] += sum;
            }
        }
    }
    const int exponent = group.exponent + (halves ? kSubnormalExponent : 0);
    for (int row = 0; row < kWarpRows; ++row) {
        for (int n = 0; n < 8; ++n) {
            total[row][n] += std::ldexp(all[row][n], exponent);
        }
    }
}

inline void emulate_linear(const cuda::BitserialLinear& p, const std::vector<PlaneGroup>& groups) {
    using Group = void (*)(const cuda::BitserialLinear&, const PlaneGroup&, int64_t, int64_t, float (&)[kWarpRows][8]);
    constexpr Group kFew[] = {emulate_group<1, half_sets(1, 8)>, emulate_group<2, half_sets(2, 8)>,
                              emulate_group<3, half_sets(3, 8)>, emulate_group<4, half_sets(4, 8)>,
                              emulate_group<5, half_sets(5, 8)>, emulate_group<6, half_sets(6, 8)>,
                              emulate_group<7, half_sets(7, 8)>, emulate_group<8, half_sets(8, 8)>};
    constexpr Group kMany[] = {emulate_group<1, half_sets(1, 16)>, emulate_group<2, half_sets(2, 16)>};
    for (int64_t tile_row = 0; tile_row * kWarpRows < p.rows; ++tile_row) {
        for (int64_t first_input = 0; first_input < p.batch; first_input += 8) {
            float total[kWarpRows][8] = {};
            for (const auto& group : groups) {
                const Group* chosen = group.planes <= 2 && p.batch > 8 ? kMany : kFew;
                chosen[group.planes - 1](p, group, tile_row, first_input, total);
            }
            for (int i = 0; i < kWarpRows * 8; ++i) {
                const int64_t row = tile_row * kWarpRows + i / 8, input = first_input + i % 8;
                if (row >= p.rows || input >= p.batch) continue;
                const float bias = p.bias == nullptr ? 0.0f : p.bias[row];
                const float value = std::fmaf(p.step[p.step_per_row ? row : 0], total[i / 8][i % 8], bias);
                const int64_t at = input * p.rows + row;
                if (p.dtype == DType::f32) static_cast<float*>(p.output)[at] = value;
                if (p.dtype == DType::f16) static_cast<f16*>(p.output)[at] = from_float<f16>(value);
                if (p.dtype == DType::bf16) static_cast<bf16*>(p.output)[at] = from_float<bf16>(value);
            }
        }
    }
}

inline void emulate_weight(const BitserialWeight& p) {
    const bool byte = p.exponents[0] < 8;
    const auto tiled = byte ? make_weights<true, true> : make_weights<true, false>;
    const auto canonical = byte ? make_weights<false, true> : make_weights<false, false>;
    WeightItem made;
    for (int64_t item = 0; item < weight_items(p); ++item) {
        (p.blocks > 0 ? tiled : canonical)(p, item, total_offset(p), made);
        std::copy(made.value, made.value + made.count, static_cast<float*>(p.output) + made.first);
    }
}

}  // namespace csq
