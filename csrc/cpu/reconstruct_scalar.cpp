// The kernels for any processor: a vector of one float.
#include "cpu/kernels.h"
#include "cpu/reconstruct_kernel.h"

namespace csq::cpu {
namespace {

struct Scalar {
    using f = float;
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

    static Doubles no_doubles() { return 0.0; }
    static void add_to(Doubles& sum, f x) { sum += static_cast<double>(x); }
    static double total(Doubles sum) { return sum; }

    static void stream_lines(void* target, const void* source, int64_t lines) {
        std::memcpy(target, source, lines * 64);
    }
    static void fence() {}
};

}  // namespace

const ReconstructKernels kScalarKernels = kKernels<Scalar>;

}  // namespace csq::cpu
