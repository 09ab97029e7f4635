// Products with packed weights on the processor as functions of addresses and sizes, which are checked once more.
#include "cpu/bitserial.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"

namespace csq::python {
namespace {

namespace py = pybind11;
using Pair = std::array<int64_t, 2>;

Precision parse_precision(const std::string& name) {
    if (name == "exact") return Precision::exact;
    if (name == "high") return Precision::high;
    if (name == "int8") return Precision::int8;
    fail("precision", "as exact, high or int8", name);
}

PlaneSet parse_planes(const std::vector<int>& coefficients) {
    PlaneSet set{};
    int previous = kMaxWeightPlanes;
    for (const int coefficient : coefficients) {
        const int64_t size = coefficient < 0 ? -int64_t{coefficient} : coefficient;
        const int exponent = size > 0 ? __builtin_ctzll(static_cast<uint64_t>(size)) : 0;
        if (size != int64_t{1} << exponent || exponent >= previous) {
            fail("coefficients", "as powers of two with a sign, in falling magnitude", std::to_string(coefficient));
        }
        set.exponents[set.count] = previous = exponent;
        set.inverted[set.count++] = coefficient < 0;
    }
    return set;
}

void require_sizes(std::initializer_list<std::pair<const char*, int64_t>> sizes, int64_t element) {
    int64_t bytes = element;
    for (const auto& [name, size] : sizes) {
        require_from(name, size, 1);
        if (__builtin_mul_overflow(bytes, size, &bytes)) fail(name, "that fits in memory", std::to_string(size));
    }
}

// So that no product of two sizes overflows.
void require_below(const char* name, int64_t value) {
    if (value >= int64_t{1} << 20) fail(name, "below 2^20", std::to_string(value));
}

// What is known of a packed weight before its memory is.
struct Linear {
    cpu::PackedWeight weight;
};

struct Conv2d {
    cpu::PackedWeight weight;
    cpu::Convolution convolution;  // without batch, size and out
};

Linear make_linear(int64_t rows, int64_t columns, const std::vector<int>& coefficients, bool step_per_row) {
    require_sizes({{"rows", rows}, {"columns", columns}}, 64 * kMaxWeightPlanes);
    Linear linear{};
    linear.weight.rows = rows;
    linear.weight.columns = columns;
    linear.weight.planes = parse_planes(coefficients);
    linear.weight.step_per_row = step_per_row;
    return linear;
}

Conv2d make_conv2d(int64_t rows, int64_t channels, const Pair& kernel, const Pair& stride, const Pair& padding,
                   const Pair& dilation, const std::vector<int>& coefficients, bool step_per_row) {
    require_sizes({{"channels", channels}, {"kernel", kernel[0]}, {"kernel", kernel[1]}}, 64 * kMaxWeightPlanes);
    const int64_t columns = kernel[0] * kernel[1] * ((channels + kGroup - 1) / kGroup * kGroup);
    if (columns > cpu::kMostConvColumns) {
        fail("columns", "of at most " + std::to_string(cpu::kMostConvColumns), std::to_string(columns));
    }
    Conv2d conv{};
    conv.weight = make_linear(rows, columns, coefficients, step_per_row).weight;
    conv.convolution.channels = channels;
    for (int i = 0; i < 2; ++i) {
        require_from("stride", stride[i], 1);
        require_from("padding", padding[i], 0);
        require_from("dilation", dilation[i], 1);
        for (const int64_t value : {stride[i], padding[i], dilation[i]}) require_below("sizes", value);
        conv.convolution.kernel[i] = kernel[i], conv.convolution.stride[i] = stride[i];
        conv.convolution.padding[i] = padding[i], conv.convolution.dilation[i] = dilation[i];
    }
    return conv;
}

// The kernels load vectors of 32 bytes from where these begin.
template <class T>
T* tiles_at(Address address) {
    if (address % 32 != 0) fail("tiles", "at a multiple of 32 bytes", std::to_string(address));
    return array<T>("tiles", address);
}

cpu::PackedWeight with_memory(cpu::PackedWeight weight, Address tiles, Address step, Address bias) {
    weight.tiles = weight.planes.count == 0 ? nullptr : tiles_at<const uint8_t>(tiles);
    weight.step = array<const float>("step", step);
    weight.bias = reinterpret_cast<const float*>(bias);
    return weight;
}

cpu::Convolution with_input(cpu::Convolution c, int64_t batch, const Pair& size) {
    require_sizes({{"batch", batch}, {"channels", c.channels}, {"height", size[0]}, {"width", size[1]}}, 64);
    c.batch = batch;
    for (int i = 0; i < 2; ++i) {
        require_below("size", size[i]);
        const int64_t reach = c.dilation[i] * (c.kernel[i] - 1) + 1, padded = size[i] + 2 * c.padding[i];
        if (reach > padded) fail("input", "at least as large as the kernel", std::to_string(padded));
        c.size[i] = size[i];
        c.out[i] = (padded - reach) / c.stride[i] + 1;
    }
    const int64_t lines = (c.channels + kGroup - 1) / kGroup * kGroup * (size[0] + 2 * c.padding[0]);
    if (lines >= (int64_t{1} << 31) / (size[1] + 2 * c.padding[1])) {
        fail("input", "of less than 2^31 elements a sample, with its padding", std::to_string(lines) + " rows of them");
    }
    return c;
}

// Memory that a thread keeps from call to call, up to a size: asking for it anew costs as much as a small layer.
class Scratch {
public:
    explicit Scratch(int64_t bytes) {
        if (bytes > kKept) {
            own_ = allocate(bytes);
        } else if (kept().size < bytes) {
            kept() = {allocate(bytes), bytes};
        }
        memory_ = bytes > kKept ? own_.get() : kept().memory.get();
    }
    uint8_t* get() const { return memory_; }

private:
    static constexpr int64_t kKept = int64_t{16} << 20;
    static constexpr std::align_val_t kLine{64};
    struct Delete {
        void operator()(uint8_t* memory) const { ::operator delete[](memory, kLine); }
    };
    using Memory = std::unique_ptr<uint8_t[], Delete>;
    struct Kept {
        Memory memory;
        int64_t size = 0;
    };
    static Memory allocate(int64_t bytes) { return Memory(new (kLine) uint8_t[static_cast<size_t>(bytes)]); }
    static Kept& kept() {
        thread_local Kept kept;
        return kept;
    }
    Memory own_;
    uint8_t* memory_;
};

void run_linear(const Linear& linear, Address input, Address tiles, Address step, Address bias, Address output,
                int64_t batch, const std::string& precision_name, int threads) {
    require_sizes({{"batch", batch}, {"rows", linear.weight.rows}, {"columns", linear.weight.columns}}, 64);
    require_from("threads", threads, 1);
    const Precision precision = parse_precision(precision_name);
    const cpu::PackedWeight weight = with_memory(linear.weight, tiles, step, bias);
    const Scratch scratch(cpu::bitserial_linear_scratch(weight, precision, batch));
    cpu::bitserial_linear(weight, precision, batch, array<const float>("input", input), array<float>("output", output),
                          scratch.get(), threads);
}

const char* linear_path(const Linear& linear, int64_t batch, const std::string& precision_name) {
    return cpu::bitserial_linear_path(linear.weight, parse_precision(precision_name), batch);
}

void run_conv2d(const Conv2d& conv, Address input, Address tiles, Address step, Address bias, Address output,
                int64_t batch, const Pair& size, const std::string& precision_name, int threads) {
    require_from("threads", threads, 1);
    const Precision precision = parse_precision(precision_name);
    const cpu::Convolution c = with_input(conv.convolution, batch, size);
    const cpu::PackedWeight weight = with_memory(conv.weight, tiles, step, bias);
    const Scratch scratch(cpu::bitserial_conv2d_scratch(weight, precision, c));
    cpu::bitserial_conv2d(weight, precision, c, array<const float>("input", input), array<float>("output", output),
                          scratch.get(), threads);
}

const int32_t* order_of(const std::vector<int32_t>& order, int64_t stream_columns) {
    for (const int32_t column : order) {
        if (column < -1 || column >= stream_columns) {
            fail("order", "of columns below " + std::to_string(stream_columns), std::to_string(column));
        }
    }
    return order.empty() ? nullptr : order.data();
}

}  // namespace

void bind_bitserial(py::module_& m) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.attr("tile_rows") = kTileRows;
    m.attr("tile_columns") = kTileColumns;
    m.def(
        "bitserial_tile",
        [](Address planes, int64_t rows, int64_t stream_columns, const std::vector<int32_t>& order,
           const std::vector<int>& coefficients, Address tiles, int threads) {
            require_sizes({{"rows", rows}, {"stream_columns", stream_columns}}, 64 * kMaxWeightPlanes);
            require_from("threads", threads, 1);
            const int32_t* from = order_of(order, stream_columns);
            const int64_t columns = from == nullptr ? stream_columns : static_cast<int64_t>(order.size());
            cpu::tile_planes(array<const uint8_t>("planes", planes), rows, stream_columns, from, columns,
                             parse_planes(coefficients), tiles_at<uint8_t>(tiles), threads);
        },
        unlocked, "Canonical planes to tiles; a column of the tiles is column order[i] of the stream, -1 for none.",
        py::arg("planes"), py::arg("rows"), py::arg("stream_columns"), py::arg("order"), py::arg("coefficients"),
        py::arg("tiles"), py::arg("threads"));
    m.def(
        "bitserial_untile",
        [](Address tiles, int64_t rows, int64_t stream_columns, const std::vector<int32_t>& order,
           const std::vector<int>& coefficients, Address planes, int threads) {
            require_sizes({{"rows", rows}, {"stream_columns", stream_columns}}, 64 * kMaxWeightPlanes);
            require_from("threads", threads, 1);
            const int32_t* from = order_of(order, stream_columns);
            const int64_t columns = from == nullptr ? stream_columns : static_cast<int64_t>(order.size());
            cpu::untile_planes(tiles_at<const uint8_t>(tiles), rows, stream_columns, from, columns,
                               parse_planes(coefficients), array<uint8_t>("planes", planes), threads);
        },
        unlocked, "The inverse of bitserial_tile.", py::arg("tiles"), py::arg("rows"), py::arg("stream_columns"),
        py::arg("order"), py::arg("coefficients"), py::arg("planes"), py::arg("threads"));
    py::class_<Linear>(m, "BitserialLinear", "A packed weight [rows, columns], but for its memory.")
        .def(py::init(&make_linear), py::arg("rows"), py::arg("columns"), py::arg("coefficients"),
             py::arg("step_per_row"))
        .def("__call__", &run_linear, unlocked, "output = input W^T + bias for a weight in tiles; bias may be 0.",
             py::arg("input"), py::arg("tiles"), py::arg("step"), py::arg("bias"), py::arg("output"), py::arg("batch"),
             py::arg("precision"), py::arg("threads"))
        .def("path", &linear_path, "How a call computes: look-up, byte products or float products.", py::arg("batch"),
             py::arg("precision"));
    m.def(
        "bitserial_weight_of_planes",
        [](Address planes, int64_t outer, int64_t channels, int64_t inner, const std::vector<int>& coefficients,
           Address step, bool step_per_channel, Address output) {
            require_sizes({{"outer", outer}, {"channels", channels}, {"inner", inner}}, 64);
            const PlaneSet set = parse_planes(coefficients);
            cpu::weight_of_planes(set.count == 0 ? nullptr : array<const uint8_t>("planes", planes), outer, channels,
                                  inner, set, array<const float>("step", step), step_per_channel,
                                  array<float>("output", output));
        },
        unlocked, "The weight [outer, channels, inner] of canonical planes.", py::arg("planes"), py::arg("outer"),
        py::arg("channels"), py::arg("inner"), py::arg("coefficients"), py::arg("step"), py::arg("step_per_channel"),
        py::arg("output"));
    m.def(
        "bitserial_weight",
        [](const Linear& linear, Address tiles, Address step, Address output, int threads) {
            require_from("threads", threads, 1);
            cpu::bitserial_weight(with_memory(linear.weight, tiles, step, 0), array<float>("output", output), threads);
        },
        unlocked, "The weight itself, columns in the order of the tiles.", py::arg("linear"), py::arg("tiles"),
        py::arg("step"), py::arg("output"), py::arg("threads"));
    py::class_<Conv2d>(m, "BitserialConv2d", "A packed convolution, but for its memory and the size of the input.")
        .def(py::init(&make_conv2d), py::arg("rows"), py::arg("channels"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("coefficients"), py::arg("step_per_row"))
        .def("__call__", &run_conv2d, unlocked,
             "Convolution with a weight in tiles, zeros around the input; bias may be 0.", py::arg("input"),
             py::arg("tiles"), py::arg("step"), py::arg("bias"), py::arg("output"), py::arg("batch"), py::arg("size"),
             py::arg("precision"), py::arg("threads"));
}

}  // namespace csq::python
