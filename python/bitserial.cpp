// Products with packed weights on the processor as functions of addresses and sizes, which are checked once more.
#include "cpu/bitserial.h"

#include <pybind11/stl.h>

#include <array>
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

cpu::PackedWeight parse_weight(int64_t rows, int64_t columns, const std::vector<int>& coefficients, Address tiles,
                               Address step, bool step_per_row, Address bias) {
    require_sizes({{"rows", rows}, {"columns", columns}}, 64 * kMaxWeightPlanes);
    cpu::PackedWeight weight{};
    weight.rows = rows;
    weight.columns = columns;
    weight.planes = parse_planes(coefficients);
    weight.tiles = weight.planes.count == 0 ? nullptr : array<const uint8_t>("tiles", tiles);
    weight.step = array<const float>("step", step);
    weight.step_per_row = step_per_row;
    weight.bias = reinterpret_cast<const float*>(bias);
    return weight;
}

cpu::Convolution parse_convolution(int64_t batch, int64_t channels, const Pair& size, const Pair& kernel,
                                   const Pair& stride, const Pair& padding, const Pair& dilation) {
    cpu::Convolution c{};
    c.batch = batch;
    c.channels = channels;
    require_sizes({{"batch", batch}, {"channels", channels}, {"height", size[0]}, {"width", size[1]}}, 64);
    for (int i = 0; i < 2; ++i) {
        require_from("kernel", kernel[i], 1);
        require_from("stride", stride[i], 1);
        require_from("padding", padding[i], 0);
        require_from("dilation", dilation[i], 1);
        // Everything below 2^20, so that no product here overflows.
        for (const int64_t value : {size[i], kernel[i], stride[i], padding[i], dilation[i]}) {
            if (value >= int64_t{1} << 20) fail("sizes of a convolution", "below 2^20", std::to_string(value));
        }
        const int64_t reach = dilation[i] * (kernel[i] - 1) + 1, padded = size[i] + 2 * padding[i];
        if (reach > padded) fail("input", "at least as large as the kernel", std::to_string(padded));
        c.size[i] = size[i], c.kernel[i] = kernel[i], c.stride[i] = stride[i], c.padding[i] = padding[i];
        c.dilation[i] = dilation[i];
        c.out[i] = (padded - reach) / stride[i] + 1;
    }
    const int64_t image = (channels + kGroup - 1) / kGroup * kGroup * (size[0] + 2 * padding[0]);
    if (image >= (int64_t{1} << 31) / (size[1] + 2 * padding[1])) {
        fail("input", "of less than 2^31 elements a sample, with its padding", std::to_string(image) + " rows of them");
    }
    return c;
}

int64_t conv_columns(const cpu::Convolution& c) {
    const int64_t columns = c.kernel[0] * c.kernel[1] * ((c.channels + kGroup - 1) / kGroup * kGroup);
    if (columns > cpu::kMostConvColumns) {
        fail("columns", "of at most " + std::to_string(cpu::kMostConvColumns), std::to_string(columns));
    }
    return columns;
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
                             parse_planes(coefficients), array<uint8_t>("tiles", tiles), threads);
        },
        unlocked, "Canonical planes to tiles; a column of the tiles is column order[i] of the stream, -1 for none.",
        py::arg("planes"), py::arg("rows"), py::arg("stream_columns"), py::arg("order"), py::arg("coefficients"),
        py::arg("tiles"), py::arg("threads"));
    m.def(
        "bitserial_untile",
        [](Address tiles, int64_t rows, int64_t stream_columns, const std::vector<int32_t>& order,
           const std::vector<int>& coefficients, Address planes) {
            require_sizes({{"rows", rows}, {"stream_columns", stream_columns}}, 64 * kMaxWeightPlanes);
            const int32_t* from = order_of(order, stream_columns);
            const int64_t columns = from == nullptr ? stream_columns : static_cast<int64_t>(order.size());
            cpu::untile_planes(array<const uint8_t>("tiles", tiles), rows, stream_columns, from, columns,
                               parse_planes(coefficients), array<uint8_t>("planes", planes));
        },
        unlocked, "The inverse of bitserial_tile.", py::arg("tiles"), py::arg("rows"), py::arg("stream_columns"),
        py::arg("order"), py::arg("coefficients"), py::arg("planes"));
    m.def(
        "bitserial_linear_scratch",
        [](int64_t batch, int64_t rows, int64_t columns, const std::vector<int>& coefficients,
           const std::string& precision) {
            require_sizes({{"batch", batch}, {"rows", rows}, {"columns", columns}}, 64);
            cpu::PackedWeight weight{};
            weight.rows = rows;
            weight.columns = columns;
            weight.planes = parse_planes(coefficients);
            return cpu::bitserial_linear_scratch(weight, parse_precision(precision), batch);
        },
        "Bytes of scratch that bitserial_linear needs.", py::arg("batch"), py::arg("rows"), py::arg("columns"),
        py::arg("coefficients"), py::arg("precision"));
    m.def(
        "bitserial_linear",
        [](Address input, Address tiles, Address step, Address bias, Address output, Address scratch, int64_t batch,
           int64_t rows, int64_t columns, const std::vector<int>& coefficients, bool step_per_row,
           const std::string& precision, int threads) {
            require_sizes({{"batch", batch}, {"rows", rows}, {"columns", columns}}, 64);
            require_from("threads", threads, 1);
            cpu::bitserial_linear(parse_weight(rows, columns, coefficients, tiles, step, step_per_row, bias),
                                  parse_precision(precision), batch, array<const float>("input", input),
                                  array<float>("output", output), array<uint8_t>("scratch", scratch), threads);
        },
        unlocked, "output = input W^T + bias for a weight in tiles; bias may be 0.", py::arg("input"), py::arg("tiles"),
        py::arg("step"), py::arg("bias"), py::arg("output"), py::arg("scratch"), py::arg("batch"), py::arg("rows"),
        py::arg("columns"), py::arg("coefficients"), py::arg("step_per_row"), py::arg("precision"), py::arg("threads"));
    m.def(
        "bitserial_conv2d_scratch",
        [](int64_t batch, int64_t channels, const Pair& size, const Pair& kernel, const Pair& stride,
           const Pair& padding, const Pair& dilation, const std::string& precision) {
            const cpu::Convolution c = parse_convolution(batch, channels, size, kernel, stride, padding, dilation);
            cpu::PackedWeight weight{};
            weight.columns = conv_columns(c);
            return cpu::bitserial_conv2d_scratch(weight, parse_precision(precision), c);
        },
        "Bytes of scratch that bitserial_conv2d needs.", py::arg("batch"), py::arg("channels"), py::arg("size"),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("precision"));
    m.def(
        "bitserial_conv2d",
        [](Address input, Address tiles, Address step, Address bias, Address output, Address scratch, int64_t batch,
           int64_t channels, int64_t rows, const Pair& size, const Pair& kernel, const Pair& stride,
           const Pair& padding, const Pair& dilation, const std::vector<int>& coefficients, bool step_per_row,
           const std::string& precision, int threads) {
            require_from("threads", threads, 1);
            const cpu::Convolution c = parse_convolution(batch, channels, size, kernel, stride, padding, dilation);
            cpu::bitserial_conv2d(parse_weight(rows, conv_columns(c), coefficients, tiles, step, step_per_row, bias),
                                  parse_precision(precision), c, array<const float>("input", input),
                                  array<float>("output", output), array<uint8_t>("scratch", scratch), threads);
        },
        unlocked, "Convolution with a weight in tiles, zeros around the input; bias may be 0.", py::arg("input"),
        py::arg("tiles"), py::arg("step"), py::arg("bias"), py::arg("output"), py::arg("scratch"), py::arg("batch"),
        py::arg("channels"), py::arg("rows"), py::arg("size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("coefficients"), py::arg("step_per_row"), py::arg("precision"), py::arg("threads"));
}

}  // namespace csq::python
