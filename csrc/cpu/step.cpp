// Chooses the instruction set and shares the tiles of all layers among the threads.
#include "cpu/step.h"

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace csq::cpu {
namespace {

// Bits (weights times planes) from which waking a team of threads pays.
constexpr int64_t kParallelBits = 16384;
// Weights from which it pays for a product of two arrays.
constexpr int64_t kParallelWeights = 65536;

const StepKernels& kernels() {
    switch (current_isa()) {
#if CSQ_X86
        case Isa::avx512:
        case Isa::avx512_vnni:
        case Isa::avx512_vbmi:
            return kAvx512Step;
        case Isa::avx2:
            return kAvx2Step;
#endif
        default:
            return kScalarStep;
    }
}

int64_t weights_of(const ReconstructParams& a) { return a.outer * a.channels * a.inner; }

// What a tile costs: its planes, and what it takes without any.
int64_t tile_cost(const StepParams& layer) { return layer.before.planes + 1; }

}  // namespace

int64_t step_scratch_size(int64_t outer, int64_t channels, int64_t inner) {
    return tiling(outer, channels, inner).slots * channels;
}

void step_scale_sums(const ReconstructParams& a, const float* grad_weight, const float* weight, float* grad_scale,
                     double* scratch, int threads) {
    const auto compute = kernels().scale_sums;
    const Tiling t = tiling(a.outer, a.channels, a.inner);
    const int64_t team = weights_of(a) < kParallelWeights ? 1 : std::min<int64_t>(threads, t.units);
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1) if (team > 1)
    for (int64_t member = 0; member < team; ++member) {
        compute(a, grad_weight, weight, scratch, t.units * member / team, t.units * (member + 1) / team);
    }
    double layer = 0.0;
    for (int64_t channel = 0; channel < a.channels; ++channel) {
        double sum = 0.0;
        for (int64_t slot = 0; slot < t.slots; ++slot) sum += scratch[slot * a.channels + channel];
        if (a.scale_per_channel) {
            grad_scale[channel] = static_cast<float>(sum / static_cast<double>(a.scale[channel]));
        } else {
            layer += sum;
        }
    }
    if (!a.scale_per_channel) grad_scale[0] = static_cast<float>(layer / static_cast<double>(a.scale[0]));
}

void step_update(const std::vector<StepParams>& layers, int threads) {
    const StepKernels& table = kernels();
    int64_t cost = 0, bits = 0;
    for (const StepParams& layer : layers) {
        cost += tile_cost(layer) * ceil_div(weights_of(layer.before), kTile);
        bits += weights_of(layer.before) * layer.before.planes;
    }
    const int64_t team = bits < kParallelBits ? 1 : threads;
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1) if (team > 1)
    for (int64_t member = 0; member < team; ++member) {
        // The member's share of the cost; a tile belongs to whom its beginning falls to.
        const int64_t from = cost * member / team, to = cost * (member + 1) / team;
        int64_t passed = 0;
        for (const StepParams& layer : layers) {
            const int64_t each = tile_cost(layer), tiles = ceil_div(weights_of(layer.before), kTile);
            const auto tile_at = [&](int64_t place) {
                return std::clamp<int64_t>(ceil_div(std::max<int64_t>(place - passed, 0), each), 0, tiles);
            };
            const int64_t begin = tile_at(from), end = tile_at(to);
            if (begin < end) table.update[static_cast<int>(layer.before.dtype)](layer, begin, end);
            passed += each * tiles;
        }
    }
}

}  // namespace csq::cpu
