// The kernels of reconstruction, written once over a vector type V and compiled once per instruction set.
// Included inside a target region: whatever is defined here must depend on V, so that no two regions share a symbol.
#pragma once

namespace csq::cpu {

// A coefficient that every weight of a tile shares, and one that differs from lane to lane.
template <class V>
struct Uniform {
    float value;
    bool zero() const { return value == 0.0f; }
    typename V::f at(int64_t) const { return V::set1(value); }
};
template <class V>
struct PerLane {
    const float* values;
    bool zero() const { return false; }
    typename V::f at(int64_t i) const { return V::load(values + i); }
};

// Equation (1) for N vectors, exp(-x) = 2^(rate * logit) as in core/soft_bits.h: 1 / (1 + exp(-x)); exactly 0 below
// kSigmoidZero; NaN propagates. Rate and product round once each, so exp(-x) errs by (2 |x| + 1) u, of which a sigmoid
// keeps the part 1 - P; with addition and division 2 u more. The vectors go side by side: each line waits for the one
// before. Inlined, so that a loop keeps the constants in registers.
template <class V, int N>
[[gnu::always_inline]] inline void sigmoids(const typename V::f (&logits)[N], typename V::f rate,
                                            typename V::f (&bits)[N]) {
    using f = typename V::f;
    // Adding 1.5 * 2^23 rounds to an integer; the 127 more makes its low bits the exponent field of that power of two.
    const f magic = V::set1(0x1.8p23f + 127.0f), one = V::set1(1.0f);
    f t[N], r[N], power[N], p[N];
    const auto each = [](const auto& line) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) line(i);
    };
    each([&](int i) { t[i] = V::mul(rate, logits[i]); });
    // Below -60, 1 + 2^t is 1. The operand order keeps a NaN: max returns its second operand then.
    each([&](int i) { r[i] = V::max(V::set1(-60.0f), t[i]); });
    each([&](int i) { power[i] = V::add(r[i], magic); });
    each([&](int i) { r[i] = V::sub(r[i], V::sub(power[i], magic)); });
    // Minimax for 2^r on |r| <= 1/2 with the first coefficient 1: relative error 3.0e-9.
    each([&](int i) { p[i] = V::fma(V::set1(1.5326471e-4f), r[i], V::set1(1.3390806e-3f)); });
    each([&](int i) { p[i] = V::fma(p[i], r[i], V::set1(9.618506e-3f)); });
    each([&](int i) { p[i] = V::fma(p[i], r[i], V::set1(5.55036e-2f)); });
    each([&](int i) { p[i] = V::fma(p[i], r[i], V::set1(0.24022648f)); });
    each([&](int i) { p[i] = V::fma(p[i], r[i], V::set1(0.6931472f)); });
    each([&](int i) { p[i] = V::fma(p[i], r[i], one); });
    each([&](int i) { p[i] = V::fma(p[i], V::exponent(power[i]), one); });
    const f limit = V::set1(exponent_rate(kSigmoidZero));
    each([&](int i) { bits[i] = V::zero_where_greater(V::div(one, p[i]), t[i], limit); });
}

template <class V, class T>
struct Reconstruct {
    using f = typename V::f;
    static constexpr int64_t W = V::width;
    static constexpr int64_t kPrefetch = 1024;  // weights

    // Coefficients of a tile: what multiplies plane k in (3), 2^b G_b, and the step s / (2^n - 1).
    struct Coefficients {
        float plane[kMaxPlanes];
        float step;
    };
    struct LaneCoefficients {
        alignas(64) float plane[kMaxPlanes][kNarrowTile];
        alignas(64) float step[kNarrowTile];
        bool any[kMaxPlanes];  // false: the gates of this plane are 0 in the whole tile
    };

    static float gate_of(const ReconstructParams& a, int k, int64_t channel) {
        const int64_t index = a.gates_per_channel ? k * a.channels + channel : k;
        return gate(a.gate_logits[index], *a.temperature, a.hard_gates);
    }
    static float plane_coefficient(const ReconstructParams& a, int k, int64_t channel) {
        return static_cast<float>(1 << a.bits[k]) * gate_of(a, k, channel);
    }
    static float step_of(const ReconstructParams& a, int64_t channel) {
        return step_size(a.scale[a.scale_per_channel ? channel : 0], a.n_bits);
    }

    // A tile is too short for the processor to find the rhythm of a stream by itself; what lies past the end of the
    // tile is the beginning of the same plane's next one. Past the end of the array a prefetch does nothing.
    static void prefetch(const T* p, const T* q) {
        __builtin_prefetch(p + kPrefetch);
        __builtin_prefetch(q + kPrefetch);
    }

    // The last, incomplete vector of an array goes through memory of its own, padded with zeros.
    template <class X>
    static f load_part(const X* x, int64_t count) {
        X padded[W] = {};
        std::memcpy(padded, x, count * sizeof(X));
        return V::load(padded);
    }
    static void store_part(T* x, f value, int64_t count) {
        T padded[W];
        V::store(padded, value);
        std::memcpy(x, padded, count * sizeof(T));
    }

    template <class C>
    [[gnu::always_inline]] static void add_plane_vector(f p, f q, int64_t i, f rate, C plane, float* total) {
        const f c = plane.at(i);
        f bits[2];
        sigmoids<V, 2>({p, q}, rate, bits);
        f digit = V::sub(bits[0], bits[1]);
        // A lane whose gate is 0 takes nothing from its logits, be they NaN.
        if constexpr (std::is_same_v<C, PerLane<V>>) digit = V::zero_where_zero(digit, c);
        V::store(total + i, V::fma(c, digit, V::load(total + i)));
    }

    // total += 2^b G_b (P_b - N_b) over a tile; total has room for whole vectors.
    template <class C>
    static void add_plane(const T* p, const T* q, int64_t n, float beta, C plane, float* total) {
        const f rate = V::set1(exponent_rate(beta));
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            prefetch(p + i, q + i);
            add_plane_vector(V::load(p + i), V::load(q + i), i, rate, plane, total);
        }
        if (i < n) add_plane_vector(load_part(p + i, n - i), load_part(q + i, n - i), i, rate, plane, total);
    }

    template <class C>
    static void finish_tile(const float* total, int64_t n, C step, T* weight) {
        int64_t i = 0;
        for (; i + W <= n; i += W) V::store(weight + i, V::mul(step.at(i), V::load(total + i)));
        if (i < n) store_part(weight + i, V::mul(step.at(i), V::load(total + i)), n - i);
    }

    // Gradients (4) of one vector of plane k, if they are wanted; returns D (P - N), the term of the sums (5) and (6).
    template <bool Gradients, class C>
    [[gnu::always_inline]] static f plane_gradients(f p, f q, f grad, int64_t i, f minus_beta, f rate, C plane, C step,
                                                    T* grad_p, T* grad_q) {
        f bits[2];
        sigmoids<V, 2>({p, q}, rate, bits);
        const f positive = bits[0], negative = bits[1];
        const f term = V::mul(grad, V::sub(positive, negative));
        if constexpr (!Gradients) return term;
        const f one = V::set1(1.0f);
        const f c = plane.at(i);
        const f factor = V::mul(V::mul(V::mul(step.at(i), minus_beta), c), grad);
        // factor carries the sign of -beta: P (P - 1) turns it back, and N (1 - N) is what (4) asks for.
        f slope_p = V::mul(factor, V::mul(positive, V::sub(positive, one)));
        f slope_q = V::mul(factor, V::mul(negative, V::sub(one, negative)));
        if constexpr (std::is_same_v<C, PerLane<V>>) {
            slope_p = V::zero_where_zero(slope_p, c);
            slope_q = V::zero_where_zero(slope_q, c);
        }
        V::store(grad_p + i, slope_p);
        V::store(grad_q + i, slope_q);
        return term;
    }

    // Gradients of one plane over a tile into grad_p and grad_q, which have room for whole vectors; returns sum D (P -
    // N).
    template <bool Gradients, class G>
    static double wide_plane(const T* p, const T* q, const G* grad, int64_t n, float beta, Uniform<V> plane,
                             Uniform<V> step, T* grad_p, T* grad_q) {
        const f minus_beta = V::set1(-beta), rate = V::set1(exponent_rate(beta));
        typename V::Doubles sum = V::no_doubles();
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            prefetch(p + i, q + i);
            V::add_to(sum, plane_gradients<Gradients>(V::load(p + i), V::load(q + i), V::load(grad + i), i, minus_beta,
                                                      rate, plane, step, grad_p, grad_q));
        }
        if (i < n) {
            V::add_to(sum, plane_gradients<Gradients>(load_part(p + i, n - i), load_part(q + i, n - i),
                                                      load_part(grad + i, n - i), i, minus_beta, rate, plane, step,
                                                      grad_p, grad_q));
        }
        return V::total(sum);
    }

    // The same with coefficients per lane; the terms D (P - N) go to `terms`, to be summed by channel.
    template <bool Gradients, class G>
    static void narrow_plane(const T* p, const T* q, const G* grad, int64_t n, float beta, PerLane<V> plane,
                             PerLane<V> step, T* grad_p, T* grad_q, float* terms) {
        const f minus_beta = V::set1(-beta), rate = V::set1(exponent_rate(beta));
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            V::store(terms + i, plane_gradients<Gradients>(V::load(p + i), V::load(q + i), V::load(grad + i), i,
                                                           minus_beta, rate, plane, step, grad_p, grad_q));
        }
        if (i < n) {
            V::store(terms + i, plane_gradients<Gradients>(load_part(p + i, n - i), load_part(q + i, n - i),
                                                           load_part(grad + i, n - i), i, minus_beta, rate, plane, step,
                                                           grad_p, grad_q));
        }
    }

    // Copy a finished tile of gradients out, past the caches if `stream`: one plane at a time, because more streams
    // than the processor has write-combining buffers would be written in pieces.
    static void emit(T* target, const T* source, int64_t n, bool stream) {
        if (!stream) {
            std::memcpy(target, source, n * sizeof(T));
            return;
        }
        const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % 64 / sizeof(T));
        const int64_t head = misaligned == 0 ? 0 : std::min<int64_t>(n, 64 / sizeof(T) - misaligned);
        std::memcpy(target, source, head * sizeof(T));
        const int64_t lines = (n - head) / static_cast<int64_t>(64 / sizeof(T));
        const int64_t tail = head + lines * static_cast<int64_t>(64 / sizeof(T));
        V::stream_lines(target + head, source + head, lines);
        std::memcpy(target + tail, source + tail, (n - tail) * sizeof(T));
    }

    // Position of a unit in the weight and in the partial sums.
    struct WideUnit {
        int64_t channel, start, count, slot, partial;
    };
    static WideUnit wide_unit(const ReconstructParams& a, const Tiling& t, int64_t unit) {
        const int64_t row = unit / t.chunks, chunk = unit % t.chunks;
        const int64_t o = row / a.channels, channel = row % a.channels;
        const int64_t slot = o * t.chunks + chunk;
        return {channel, row * a.inner + chunk * kTile, std::min(kTile, a.inner - chunk * kTile), slot,
                (slot * a.channels + channel) * a.planes};
    }
    struct NarrowUnit {
        int64_t channel, channel_count, outer, outer_count, slot, partial;
    };
    static NarrowUnit narrow_unit(const ReconstructParams& a, const Tiling& t, int64_t unit) {
        const int64_t slot = unit / t.channel_groups, group = unit % t.channel_groups;
        const int64_t channel = group * t.channel_count, o = slot * t.outer_count;
        return {channel, std::min(t.channel_count, a.channels - channel), o, std::min(t.outer_count, a.outer - o),
                slot,    (slot * a.channels + channel) * a.planes};
    }

    // Wide units that follow each other mostly share their coefficients, and a gate costs an exponential in double.
    static void fill(const ReconstructParams& a, int64_t channel, int64_t previous, Coefficients& c) {
        if (channel == previous) return;
        if (previous < 0 || a.gates_per_channel) {
            for (int k = 0; k < a.planes; ++k) c.plane[k] = plane_coefficient(a, k, channel);
        }
        if (previous < 0 || a.scale_per_channel) c.step = step_of(a, channel);
    }
    static void fill(const ReconstructParams& a, const NarrowUnit& u, LaneCoefficients& c) {
        const int64_t n = u.channel_count * a.inner;
        for (int k = 0; k < a.planes; ++k) {
            c.any[k] = false;
            float value = 0.0f;
            for (int64_t j = 0; j < u.channel_count; ++j) {
                if (j == 0 || a.gates_per_channel) value = plane_coefficient(a, k, u.channel + j);
                c.any[k] |= value != 0.0f;
                std::fill_n(c.plane[k] + j * a.inner, a.inner, value);
            }
            std::fill(c.plane[k] + n, c.plane[k] + kNarrowTile, 0.0f);
        }
        for (int64_t j = 0; j < u.channel_count; ++j) {
            std::fill_n(c.step + j * a.inner, a.inner, step_of(a, u.channel + j));
        }
        std::fill(c.step + n, c.step + kNarrowTile, 0.0f);
    }

    static void forward(const ReconstructParams& a, void* weight_address, int64_t begin, int64_t end) {
        const Tiling t = tiling(a.outer, a.channels, a.inner);
        const int64_t size = a.outer * a.channels * a.inner;
        const T* positive = static_cast<const T*>(a.bit_logits);
        const T* negative = positive + a.planes * size;
        T* weight = static_cast<T*>(weight_address);
        const float beta = *a.temperature;
        alignas(64) float total[kTile];
        if (t.narrow) {
            LaneCoefficients c;
            for (int64_t unit = begin; unit < end; ++unit) {
                const NarrowUnit u = narrow_unit(a, t, unit);
                fill(a, u, c);
                const int64_t n = u.channel_count * a.inner;
                for (int64_t o = u.outer; o < u.outer + u.outer_count; ++o) {
                    const int64_t start = (o * a.channels + u.channel) * a.inner;
                    std::fill_n(total, kNarrowTile, 0.0f);
                    for (int k = 0; k < a.planes; ++k) {
                        if (!c.any[k]) continue;
                        add_plane(positive + k * size + start, negative + k * size + start, n, beta,
                                  PerLane<V>{c.plane[k]}, total);
                    }
                    finish_tile(total, n, PerLane<V>{c.step}, weight + start);
                }
            }
        } else {
            Coefficients c{};
            int64_t previous = -1;
            for (int64_t unit = begin; unit < end; ++unit) {
                const WideUnit u = wide_unit(a, t, unit);
                fill(a, u.channel, previous, c);
                previous = u.channel;
                std::fill_n(total, kTile, 0.0f);
                for (int k = 0; k < a.planes; ++k) {
                    const Uniform<V> plane{c.plane[k]};
                    if (plane.zero()) continue;
                    add_plane(positive + k * size + u.start, negative + k * size + u.start, u.count, beta, plane,
                              total);
                }
                finish_tile(total, u.count, Uniform<V>{c.step}, weight + u.start);
            }
        }
    }

    static void backward(const ReconstructParams& a, const ReconstructGradients& g, double* partial, bool stream,
                         int64_t begin, int64_t end) {
        if (g.grad_bit_logits != nullptr) return backward_units<true, T>(a, g, partial, stream, begin, end);
        if (g.grad_weight_dtype == a.dtype) return backward_units<false, T>(a, g, partial, false, begin, end);
        backward_units<false, float>(a, g, partial, false, begin, end);
    }

private:
    template <bool Gradients, class G>
    static void backward_units(const ReconstructParams& a, const ReconstructGradients& g, double* partial, bool stream,
                               int64_t begin, int64_t end) {
        const Tiling t = tiling(a.outer, a.channels, a.inner);
        const int64_t size = a.outer * a.channels * a.inner;
        const T* positive = static_cast<const T*>(a.bit_logits);
        const T* negative = positive + a.planes * size;
        const G* grad = static_cast<const G*>(g.grad_weight);
        T* grad_positive = static_cast<T*>(g.grad_bit_logits);
        T* grad_negative = grad_positive + a.planes * size;
        const float beta = *a.temperature;
        alignas(64) T tile_p[kTile];
        alignas(64) T tile_q[kTile];
        if (t.narrow) {
            LaneCoefficients c;
            alignas(64) float terms[kNarrowTile];
            for (int64_t unit = begin; unit < end; ++unit) {
                const NarrowUnit u = narrow_unit(a, t, unit);
                fill(a, u, c);
                const int64_t n = u.channel_count * a.inner;
                double* sums = partial + u.partial;
                std::fill_n(sums, u.channel_count * a.planes, 0.0);
                for (int64_t o = u.outer; o < u.outer + u.outer_count; ++o) {
                    const int64_t start = (o * a.channels + u.channel) * a.inner;
                    for (int k = 0; k < a.planes; ++k) {
                        const int64_t at = k * size + start;
                        if (c.any[k]) {
                            narrow_plane<Gradients>(positive + at, negative + at, grad + start, n, beta,
                                                    PerLane<V>{c.plane[k]}, PerLane<V>{c.step}, tile_p, tile_q, terms);
                            for (int64_t j = 0; j < u.channel_count; ++j) {
                                double sum = 0.0;
                                for (int64_t i = j * a.inner; i < (j + 1) * a.inner; ++i) sum += terms[i];
                                sums[j * a.planes + k] += sum;
                            }
                        } else if constexpr (Gradients) {
                            std::memset(tile_p, 0, n * sizeof(T));
                            std::memset(tile_q, 0, n * sizeof(T));
                        }
                        if constexpr (!Gradients) continue;
                        emit(grad_positive + at, tile_p, n, stream);
                        emit(grad_negative + at, tile_q, n, stream);
                    }
                }
            }
        } else {
            Coefficients c{};
            int64_t previous = -1;
            for (int64_t unit = begin; unit < end; ++unit) {
                const WideUnit u = wide_unit(a, t, unit);
                fill(a, u.channel, previous, c);
                previous = u.channel;
                for (int k = 0; k < a.planes; ++k) {
                    const int64_t at = k * size + u.start;
                    const Uniform<V> plane{c.plane[k]};
                    double sum = 0.0;
                    if (!plane.zero()) {
                        sum = wide_plane<Gradients>(positive + at, negative + at, grad + u.start, u.count, beta, plane,
                                                    Uniform<V>{c.step}, tile_p, tile_q);
                    } else if constexpr (Gradients) {
                        std::memset(tile_p, 0, u.count * sizeof(T));
                        std::memset(tile_q, 0, u.count * sizeof(T));
                    }
                    partial[u.partial + k] = sum;
                    if constexpr (!Gradients) continue;
                    emit(grad_positive + at, tile_p, u.count, stream);
                    emit(grad_negative + at, tile_q, u.count, stream);
                }
            }
        }
        if (stream) V::fence();
    }
};

template <class V>
inline constexpr ReconstructKernels kKernels = {
    {Reconstruct<V, float>::forward, Reconstruct<V, bf16>::forward, Reconstruct<V, f16>::forward},
    {Reconstruct<V, float>::backward, Reconstruct<V, bf16>::backward, Reconstruct<V, f16>::backward},
};

}  // namespace csq::cpu
