// A vector of one float, for any processor.
#pragma once

#include "cpu/kernels.h"

namespace csq::cpu {
namespace {

struct Scalar {
    using f = float;
    using u = uint32_t;
    using Doubles = double;
    static constexpr int64_t width = 1;

    static f set1(float x) { return x; }
    template <class T>
    static f load(const T* p) {
        return to_float(*p);
    }
    template <class T>
    static void store(T* p, f x) {
        *p = from_float<T>(x);
    }

    static f add(f a, f b) { return a + b; }
    static f sub(f a, f b) { return a - b; }
    static f mul(f a, f b) { return a * b; }
    static f div(f a, f b) { return a / b; }
    static f fma(f a, f b, f c) { return a * b + c; }
    static f max(f a, f b) { return a > b ? a : b; }
    static f exponent(f x) { return bits_float(float_bits(x) << 23); }
    static f zero_where_greater(f y, f x, f limit) { return x > limit ? 0.0f : y; }
    static f zero_where_zero(f y, f x) { return x == 0.0f ? 0.0f : y; }

    static f min(f a, f b) { return a < b ? a : b; }
    static f sqrt(f x) { return std::sqrt(x); }
    static float largest(f x) { return x; }

    static u bits(f x) { return float_bits(x); }
    static f from_bits(u x) { return bits_float(x); }
    static f from_integer(u x) { return static_cast<float>(x); }
    static u truncate(f x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
    static u splat(uint32_t x) { return x; }
    static u count_from(uint32_t x) { return x; }
    static u add(u a, u b) { return a + b; }
    static u mul(u a, u b) { return a * b; }
    static u exclusive_or(u a, u b) { return a ^ b; }
    static u both(u a, u b) { return a & b; }
    static u either(u a, u b) { return a | b; }
    static u at_least(u a, u b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b; }
    template <int n>
    static u right(u x) {
        return x >> n;
    }
    template <int n>
    static u left(u x) {
        return x << n;
    }
    // Where x < limit as signed integers, `yes`; elsewhere `no`.
    static u where_less(u x, u limit, u yes, u no) {
        return static_cast<int32_t>(x) < static_cast<int32_t>(limit) ? yes : no;
    }
    static u load_bytes(const uint8_t* p) { return *p; }
    static void store_bytes(uint8_t* p, u x) { *p = static_cast<uint8_t>(x); }
    static void store_words(uint16_t* p, u x) { *p = static_cast<uint16_t>(x); }

    static Doubles no_doubles() { return 0.0; }
    static void add_to(Doubles& sum, f x) { sum += static_cast<double>(x); }
    static double total(Doubles sum) { return sum; }

    static void stream_lines(void* target, const void* source, int64_t lines) {
        std::memcpy(target, source, lines * 64);
    }
    static void fence() {}
};

}  // namespace
}  // namespace csq::cpu
