// The single-pass step, written once over a vector type V and compiled once per instruction set.
// Included inside a target region: whatever is defined here must depend on V, so that no two regions share a symbol.
#pragma once

#include "cpu/reconstruct_kernel.h"

namespace csq::cpu {

template <class V>
inline typename V::u mix(typename V::u x) {
    x = V::mul(V::exclusive_or(x, V::template right<16>(x)), V::splat(0x7feb352du));
    x = V::mul(V::exclusive_or(x, V::template right<15>(x)), V::splat(0x846ca68bu));
    return V::exclusive_or(x, V::template right<16>(x));
}

// Rounded to bfloat16, up or down as 16 random bits decide; storing it then rounds nothing.
template <class V>
inline typename V::f round_logit(typename V::f x, typename V::u random) {
    using u = typename V::u;
    const u bits = V::bits(x);
    const u up = V::add(bits, V::template right<16>(random));
    // An exponent of all ones has nothing to round: infinity would become NaN, and NaN something else.
    const u finite = V::splat(0x7f800000u);
    return V::from_bits(V::both(V::where_less(V::both(bits, finite), finite, up, bits), V::splat(0xffff0000u)));
}

// float8 e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; below 2^-6 in steps of 2^-9.
template <class V>
inline typename V::f from_float8(typename V::u code) {
    using f = typename V::f;
    using u = typename V::u;
    const u magnitude = V::both(code, V::splat(0x7f));
    const f normal = V::from_bits(V::add(V::template left<20>(magnitude), V::splat(120u << 23)));
    // With the exponent of 2^-6 the mantissa says how far above 2^-6 the value would be.
    const f small =
        V::sub(V::from_bits(V::either(V::template left<20>(magnitude), V::splat(121u << 23))), V::set1(0x1p-6f));
    const u value = V::where_less(magnitude, V::splat(8), V::bits(small), V::bits(normal));
    return V::from_bits(V::either(value, V::template left<24>(V::both(code, V::splat(0x80)))));
}
// Stochastic: 20 random bits decide the 20 that are dropped.
template <class V>
inline typename V::u to_float8(typename V::f x, typename V::u random) {
    using f = typename V::f;
    using u = typename V::u;
    const u bits = V::bits(x);
    const f size = V::min(V::from_bits(V::both(bits, V::splat(0x7fffffffu))), V::set1(kLargestFloat8));
    const u dropped = V::template right<12>(random);
    const u normal =
        V::add(V::template right<20>(V::add(V::bits(size), dropped)), V::splat(static_cast<uint32_t>(-(120 << 3))));
    const u small = V::truncate(V::fma(V::from_integer(dropped), V::set1(0x1p-20f), V::mul(size, V::set1(0x1p9f))));
    const u code = V::where_less(V::bits(size), V::bits(V::set1(0x1p-6f)), small, normal);
    return V::either(code, V::both(V::template right<24>(bits), V::splat(0x80)));
}

// Momenta of a plane in 8 bits. The second one of Adam is kept as its square root: that halves its range.
template <class V>
struct Codes {
    using f = typename V::f;
    using u = typename V::u;
    static constexpr int64_t W = V::width;

    uint8_t* codes;
    float* scales;
    uint32_t key, counter;  // of the random number of the first code
    bool root;

    // Both take n codes from a block's beginning on; `values` has room for whole vectors.
    void decode(int64_t n, float* values) const {
        for (int64_t i = 0; i < n; i += W) {
            uint8_t part[W] = {};
            if (n - i < W) std::memcpy(part, codes + i, n - i);
            const u code = V::load_bytes(n - i < W ? part : codes + i);
            const f x = V::mul(from_float8<V>(code), V::set1(scales[i / kMomentumBlock]));
            V::store(values + i, root ? V::mul(x, x) : x);
        }
    }
    void encode(int64_t n, float* values) const {
        std::fill(values + n, values + (n + W - 1) / W * W, 0.0f);
        for (int64_t first = 0; first < n; first += kMomentumBlock)
            encode_block(first, std::min(kMomentumBlock, n - first), values);
    }

private:
    void encode_block(int64_t first, int64_t count, float* values) const {
        f sizes = V::set1(0.0f);
        for (int64_t i = first; i < first + count; i += W) {
            if (root) V::store(values + i, V::sqrt(V::load(values + i)));
            sizes = V::max(sizes, V::from_bits(V::both(V::bits(V::load(values + i)), V::splat(0x7fffffffu))));
        }
        const float largest = V::largest(sizes);
        // The inverse of less would overflow; no logit can feel it.
        const bool any = largest > 0x1p-100f;
        scales[first / kMomentumBlock] = any ? largest / kLargestFloat8 : 0.0f;
        const f inverse = V::set1(any ? kLargestFloat8 / largest : 0.0f);
        for (int64_t i = first; i < first + count; i += W) {
            const u random = mix<V>(V::count_from(key + counter + static_cast<uint32_t>(i)));
            const f x = V::mul(V::load(values + i), inverse);
            u code = to_float8<V>(x, random);
            // Divided by the root of 0 a step would be a leap.
            if (root) code = V::where_less(V::splat(0), V::bits(x), V::at_least(code, V::splat(1)), code);
            uint8_t part[W];
            const int64_t left = first + count - i;
            V::store_bytes(left < W ? part : codes + i, code);
            if (left < W) std::memcpy(codes + i, part, left);
        }
    }
};

template <class V, class T>
struct Step {
    using f = typename V::f;
    using u = typename V::u;
    static constexpr int64_t W = V::width;
    static constexpr int64_t kPrefetch = Reconstruct<V, T>::kPrefetch;
    static_assert(kTile % kMomentumBlock == 0);

    struct Rule {
        f lr, decay, gain, kept, direct, second_decay, second_gain, root, epsilon;

        explicit Rule(const StepRule& r)
            : lr(V::set1(-r.lr)),
              decay(V::set1(r.decay)),
              gain(V::set1(r.gain)),
              kept(V::set1(r.kept)),
              direct(V::set1(r.direct)),
              second_decay(V::set1(r.second_decay)),
              second_gain(V::set1(r.second_gain)),
              root(V::set1(r.root)),
              epsilon(V::set1(r.epsilon)) {}
    };

    // The next logit, with its momenta at `momenta` read and written.
    template <int Momenta>
    static f move(const Rule& rule, f x, f g, float* const (&momenta)[2], int64_t at) {
        if constexpr (Momenta == 0) {
            return V::fma(rule.lr, g, x);
        } else if constexpr (Momenta == 1) {
            const f m = V::fma(rule.decay, V::load(momenta[0] + at), V::mul(rule.gain, g));
            V::store(momenta[0] + at, m);
            return V::fma(rule.lr, V::fma(rule.kept, m, V::mul(rule.direct, g)), x);
        } else {
            const f old = V::load(momenta[0] + at);
            const f m = V::fma(rule.gain, V::sub(g, old), old);
            const f v = V::fma(rule.second_decay, V::load(momenta[1] + at), V::mul(rule.second_gain, V::mul(g, g)));
            V::store(momenta[0] + at, m);
            V::store(momenta[1] + at, v);
            return V::fma(rule.lr, V::div(m, V::fma(rule.root, V::sqrt(v), rule.epsilon)), x);
        }
    }

    // What a plane of a tile consists of, positive and negative: logits and momenta.
    struct Plane {
        T* logits[2];
        float* momenta[2][2];
    };

    // What holds for a whole tile, and its sums: grad is D s / (2^n - 1) times -beta, total that of (3).
    struct Tile {
        alignas(64) float grad[kTile];
        alignas(64) float total[kTile];
        float beta_before, beta_next;
        uint32_t key;
    };

    // What moves the logits of a plane and makes the next weight of them: before and next are 2^b G_b of the two
    // weights. A gate of 0 takes nothing from its logits, be they NaN, and moves nothing.
    template <int Momenta, class C>
    struct Mover {
        const Rule rule;
        const f rate_before, rate_next;
        const C before, next;
        const uint32_t key;
        const uint32_t counters[2];

        // One vector of a plane, `at` in its arrays and `i` in the tile.
        [[gnu::always_inline]] void move_vector(const Plane& plane, int64_t at, Tile& tile, int64_t i) const {
            const f one = V::set1(1.0f);
            const f x[2] = {V::load(plane.logits[0] + at), V::load(plane.logits[1] + at)};
            f bits[2], moved[2];
            sigmoids<V>(x, rate_before, bits);
            const f slope = V::mul(before.at(i), V::load(tile.grad + i));
            // grad carries the sign of -beta: P (P - 1) turns it back, and N (1 - N) is what (4) asks for.
            const f curves[2] = {V::mul(bits[0], V::sub(bits[0], one)), V::mul(bits[1], V::sub(one, bits[1]))};
#pragma GCC unroll 2
            for (int sign = 0; sign < 2; ++sign) {
                const f g = V::zero_where_zero(V::mul(slope, curves[sign]), before.at(i));
                moved[sign] = move<Momenta>(rule, x[sign], g, plane.momenta[sign], at);
                if constexpr (!std::is_same_v<T, float>) {
                    const u random = mix<V>(V::count_from(key + counters[sign] + static_cast<uint32_t>(i)));
                    moved[sign] = round_logit<V>(moved[sign], random);
                }
                V::store(plane.logits[sign] + at, moved[sign]);
            }
            sigmoids<V>(moved, rate_next, bits);
            const f digit = V::zero_where_zero(V::sub(bits[0], bits[1]), next.at(i));
            V::store(tile.total + i, V::fma(next.at(i), digit, V::load(tile.total + i)));
        }

        [[gnu::always_inline]] void move_plane(const Plane& plane, Tile& tile, int64_t n) const {
            int64_t i = 0;
            for (; i + W <= n; i += W) {
                for (const int sign : {0, 1}) {
                    __builtin_prefetch(plane.logits[sign] + i + kPrefetch);
                    for (int m = 0; m < Momenta; ++m) __builtin_prefetch(plane.momenta[sign][m] + i + kPrefetch);
                }
                move_vector(plane, i, tile, i);
            }
            if (i == n) return;
            // The last, incomplete vector goes through memory of its own.
            const int64_t count = n - i;
            T logits[2][W] = {};
            float momenta[2][2][W] = {};
            Plane part{};
            for (const int sign : {0, 1}) {
                part.logits[sign] = logits[sign];
                std::memcpy(logits[sign], plane.logits[sign] + i, count * sizeof(T));
                for (int m = 0; m < Momenta; ++m) {
                    part.momenta[sign][m] = momenta[sign][m];
                    std::memcpy(momenta[sign][m], plane.momenta[sign][m] + i, count * sizeof(float));
                }
            }
            move_vector(part, 0, tile, i);
            for (const int sign : {0, 1}) {
                std::memcpy(plane.logits[sign] + i, logits[sign], count * sizeof(T));
                for (int m = 0; m < Momenta; ++m) {
                    std::memcpy(plane.momenta[sign][m] + i, momenta[sign][m], count * sizeof(float));
                }
            }
        }
    };

    template <int Momenta, class C>
    static void move_plane(const Plane& plane, Tile& tile, int64_t n, const Rule& rule, C before, C next,
                           const uint32_t (&counters)[2]) {
        const Mover<Momenta, C> mover{rule,
                                      V::set1(exponent_rate(tile.beta_before)),
                                      V::set1(exponent_rate(tile.beta_next)),
                                      before,
                                      next,
                                      tile.key,
                                      {counters[0], counters[1]}};
        mover.move_plane(plane, tile, n);
    }

    template <class X>
    static void widen(const X* source, int64_t n, float* target) {
        int64_t i = 0;
        for (; i + W <= n; i += W) V::store(target + i, V::load(source + i));
        if (i == n) return;
        X part[W] = {};
        std::memcpy(part, source + i, (n - i) * sizeof(X));
        V::store(target + i, V::load(part));
    }
    template <class X>
    static void narrow(const float* source, int64_t n, X* target) {
        int64_t i = 0;
        for (; i + W <= n; i += W) V::store(target + i, V::load(source + i));
        if (i == n) return;
        X part[W];
        V::store(part, V::load(source + i));
        std::memcpy(target + i, part, (n - i) * sizeof(X));
    }
    static void widen(const void* source, DType dtype, int64_t start, int64_t n, float* target) {
        if (dtype == DType::f32) return widen(static_cast<const float*>(source) + start, n, target);
        widen(static_cast<const bf16*>(source) + start, n, target);
    }
    static void narrow(const float* source, int64_t n, void* target, DType dtype, int64_t start) {
        if (dtype == DType::f32) return narrow(source, n, static_cast<float*>(target) + start);
        narrow(source, n, static_cast<bf16*>(target) + start);
    }

    // Calls work(first, end, channel) for each run of one channel among n weights from `start` on.
    template <class Work>
    static void runs(const ReconstructParams& a, int64_t start, int64_t n, const Work& work) {
        int64_t row = start / a.inner, first = 0;
        for (int64_t end = std::min(n, (row + 1) * a.inner - start); first < n;
             first = end, end = std::min(n, end + a.inner), ++row) {
            work(first, end, row % a.channels);
        }
    }

    static void multiply(float* values, int64_t first, int64_t end, float factor) {
        for (int64_t i = first; i < end; ++i) values[i] *= factor;
    }

    template <int Momenta>
    static void run(const StepParams& s, int64_t begin, int64_t end) {
        const ReconstructParams& a = s.before;
        ReconstructParams after = a;
        after.gate_logits = s.gate_logits;
        after.scale = s.scale;
        after.temperature = s.temperature;
        const int64_t size = a.outer * a.channels * a.inner;
        const int64_t blocks = ceil_div(size, kMomentumBlock);
        const Rule rule(s.rule);
        const bool coded = Momenta > 0 && s.momentum_scales[0] != nullptr;
        Tile tile;
        tile.beta_before = *a.temperature;
        tile.beta_next = *s.temperature;
        tile.key = s.key;
        alignas(64) float values[2][2][kTile];
        alignas(64) float lanes[2][kTile];
        float gates[2][kMaxPlanes];
        if (!a.gates_per_channel) {
            for (int k = 0; k < a.planes; ++k) {
                gates[0][k] = Reconstruct<V, T>::plane_coefficient(a, k, 0);
                gates[1][k] = Reconstruct<V, T>::plane_coefficient(after, k, 0);
            }
        }
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t start = unit * kTile, n = std::min(kTile, size - start);
            widen(s.grad_weight, s.weight_dtype, start, n, tile.grad);
            const float slope = s.rule.sign * -tile.beta_before;
            runs(a, start, n, [&](int64_t first, int64_t last, int64_t channel) {
                multiply(tile.grad, first, last, slope * Reconstruct<V, T>::step_of(a, channel));
            });
            std::fill_n(tile.total, kTile, 0.0f);
            for (int k = 0; k < a.planes; ++k) {
                if (a.gates_per_channel) {
                    runs(a, start, n, [&](int64_t first, int64_t last, int64_t channel) {
                        std::fill(lanes[0] + first, lanes[0] + last,
                                  Reconstruct<V, T>::plane_coefficient(a, k, channel));
                        std::fill(lanes[1] + first, lanes[1] + last,
                                  Reconstruct<V, T>::plane_coefficient(after, k, channel));
                    });
                    for (const int time : {0, 1}) std::fill(lanes[time] + n, lanes[time] + kTile, 0.0f);
                }
                Plane plane{};
                Codes<V> codes[2][2];
                uint32_t counters[2];
                for (const int sign : {0, 1}) {
                    const int64_t row = sign * a.planes + k, place = row * size + start;
                    counters[sign] = static_cast<uint32_t>(place);
                    plane.logits[sign] = static_cast<T*>(s.bit_logits) + place;
                    for (int m = 0; m < Momenta; ++m) {
                        plane.momenta[sign][m] = static_cast<float*>(s.momenta[m]) + place;
                        if (!coded) continue;
                        codes[sign][m] = {static_cast<uint8_t*>(s.momenta[m]) + place,
                                          s.momentum_scales[m] + row * blocks + start / kMomentumBlock,
                                          s.key ^ kMomentumKeys[m], counters[sign], m == 1};
                        plane.momenta[sign][m] = values[sign][m];
                        codes[sign][m].decode(n, values[sign][m]);
                    }
                }
                if (a.gates_per_channel) {
                    move_plane<Momenta>(plane, tile, n, rule, PerLane<V>{lanes[0]}, PerLane<V>{lanes[1]}, counters);
                } else {
                    move_plane<Momenta>(plane, tile, n, rule, Uniform<V>{gates[0][k]}, Uniform<V>{gates[1][k]},
                                        counters);
                }
                for (const int sign : {0, 1}) {
                    for (int m = 0; m < Momenta && coded; ++m) codes[sign][m].encode(n, values[sign][m]);
                }
            }
            runs(a, start, n, [&](int64_t first, int64_t last, int64_t channel) {
                multiply(tile.total, first, last, Reconstruct<V, T>::step_of(after, channel));
            });
            narrow(tile.total, n, s.weight, s.weight_dtype, start);
        }
    }

    static void update(const StepParams& s, int64_t begin, int64_t end) {
        if (s.rule.momenta == 0) return run<0>(s, begin, end);
        if (s.rule.momenta == 1) return run<1>(s, begin, end);
        run<2>(s, begin, end);
    }
};

// Sums of D W over the rows of a channel, from which (6) follows: partial[slots, channels] of the tiling.
template <class V>
struct ScaleSums {
    using f = typename V::f;

    static double dot(const float* x, const float* y, int64_t n) {
        typename V::Doubles sum = V::no_doubles();
        int64_t i = 0;
        for (; i + V::width <= n; i += V::width) V::add_to(sum, V::mul(V::load(x + i), V::load(y + i)));
        double total = V::total(sum);
        for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
        return total;
    }

    static void units(const ReconstructParams& a, const float* grad, const float* weight, double* partial,
                      int64_t begin, int64_t end) {
        using R = Reconstruct<V, float>;
        const Tiling t = tiling(a.outer, a.channels, a.inner);
        for (int64_t unit = begin; unit < end; ++unit) {
            if (!t.narrow) {
                const auto u = R::wide_unit(a, t, unit);
                partial[u.slot * a.channels + u.channel] = dot(grad + u.start, weight + u.start, u.count);
                continue;
            }
            const auto u = R::narrow_unit(a, t, unit);
            for (int64_t channel = u.channel; channel < u.channel + u.channel_count; ++channel) {
                double sum = 0.0;
                for (int64_t o = u.outer; o < u.outer + u.outer_count; ++o) {
                    const int64_t start = (o * a.channels + channel) * a.inner;
                    sum += dot(grad + start, weight + start, a.inner);
                }
                partial[u.slot * a.channels + channel] = sum;
            }
        }
    }
};

// Indexed by DType; float16 logits are too coarse to be moved.
template <class V>
inline constexpr StepKernels kStepKernels = {{Step<V, float>::update, Step<V, bf16>::update}, ScaleSums<V>::units};

}  // namespace csq::cpu
