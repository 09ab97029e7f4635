// How the weight is cut into units of work. The cut depends on the shape alone, never on the threads, so that the sums
// over units are the same whoever computes them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/reconstruct.h"

namespace csq::cpu {

constexpr int64_t kTile = 2048;       // weights; the working set of a backward tile, 20 bytes a weight, stays in L1
constexpr int64_t kNarrow = 64;       // rows shorter than this are handled many at a time, one channel per lane
constexpr int64_t kNarrowTile = 512;  // weights; coefficients of 16 planes for each of them stay in L1
constexpr int64_t kNarrowUnit =
    16384;  // weights; a unit repeats the tile over `outer` and sets up its coefficients once

// A wide row, all weights of one (outer, channel), is cut into `chunks` of kTile: unit = (outer * channels + channel) *
// chunks + chunk. Narrow rows: unit = outer group * channel groups + channel group; it covers `channel_count` channels
// of `outer_count` outers. Every unit owns its entries of the partial sums, double[slots][channels][planes].
struct Tiling {
    bool narrow;
    int64_t units;
    int64_t slots;
    int64_t chunks;
    int64_t channel_groups;
    int64_t channel_count;
    int64_t outer_count;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Tiling tiling(int64_t outer, int64_t channels, int64_t inner) {
    Tiling t{};
    t.narrow = inner < kNarrow && outer * channels > 1;
    if (t.narrow) {
        t.channel_count = std::min(channels, kNarrowTile / inner);
        t.channel_groups = ceil_div(channels, t.channel_count);
        t.outer_count = std::min(outer, std::max<int64_t>(1, kNarrowUnit / (t.channel_count * inner)));
        t.slots = ceil_div(outer, t.outer_count);
        t.units = t.slots * t.channel_groups;
    } else {
        t.chunks = ceil_div(inner, kTile);
        t.slots = outer * t.chunks;
        t.units = outer * channels * t.chunks;
    }
    return t;
}

}  // namespace csq::cpu
