// Products with packed weights on a CUDA device, and their emulation, as functions of addresses, which come as
// integers, and sizes, which are checked once more.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "core/bitserial_emulation.h"
#include "cuda/bitserial.h"
#include "cuda_launch.h"

namespace csq::python {
namespace {

namespace py = pybind11;
using Groups = std::vector<std::tuple<int, int, int, int>>;

DType parse_dtype(const std::string& name) {
    if (name == "float32") return DType::f32;
    if (name == "bfloat16") return DType::bf16;
    if (name == "float16") return DType::f16;
    fail("dtype", "as float32, bfloat16 or float16", name);
}

cuda::Arithmetic parse_arithmetic(const std::string& name) {
    if (name == "float32") return cuda::Arithmetic::f32;
    if (name == "float16") return cuda::Arithmetic::f16;
    if (name == "int8") return cuda::Arithmetic::i8;
    fail("arithmetic", "as float32, float16 or int8", name);
}

void require_product(const char* name, std::initializer_list<int64_t> sizes) {
    int64_t bytes = 8 * kMaxWeightPlanes;
    for (const int64_t size : sizes) {
        require_from(name, size, 1);
        if (__builtin_mul_overflow(bytes, size, &bytes)) fail(name, "that fits in memory", std::to_string(size));
    }
}

void* aligned(const char* name, Address address) {
    if (address % 16 != 0) fail(name, "at a multiple of 16 bytes", std::to_string(address));
    return array<void>(name, address);
}

std::vector<PlaneGroup> parse_groups(const Groups& groups, int planes) {
    std::vector<PlaneGroup> parsed;
    int next = 0;
    for (const auto& [first, count, exponent, offset] : groups) {
        const bool fits = first == next && count >= 1 && count <= kMaxGroupPlanes && exponent >= 0 &&
                          exponent + count <= kMaxWeightPlanes && offset >= 0 && offset < 1 << count;
        if (!fits) fail("groups", "as adjacent (first, planes, exponent, offset)", std::to_string(first));
        parsed.push_back({first, count, exponent, offset});
        next = first + count;
    }
    if (next != planes || planes < 1) fail("groups", "of all planes", std::to_string(next));
    return parsed;
}

struct Linear {
    cuda::BitserialLinear params;
    std::vector<PlaneGroup> groups;
};

Linear parse_linear(Address tiles, Address input, Address input_steps, Address step, Address bias, Address partial,
                    Address output, int64_t batch, int64_t rows, int64_t blocks, int planes, const Groups& groups,
                    const std::string& arithmetic, const std::string& dtype, bool step_per_row) {
    require_product("batch * blocks", {batch, blocks, kWarpColumns});
    require_product("rows * blocks", {rows + kWarpRows, blocks, kWarpColumns});
    require_product("batch * rows", {batch, rows});
    Linear linear{};
    auto& p = linear.params;
    linear.groups = parse_groups(groups, planes);
    p.batch = batch;
    p.rows = rows;
    p.blocks = blocks;
    p.planes = planes;
    p.arithmetic = parse_arithmetic(arithmetic);
    p.dtype = parse_dtype(dtype);
    p.step_per_row = step_per_row;
    p.tiles = static_cast<const uint8_t*>(aligned("tiles", tiles));
    p.input = aligned("input", input);
    p.input_steps = reinterpret_cast<const float*>(input_steps);
    if (p.arithmetic == cuda::Arithmetic::i8) p.input_steps = array<const float>("input_steps", input_steps);
    p.step = array<const float>("step", step);
    p.bias = reinterpret_cast<const float*>(bias);
    if (linear.groups.size() > 1) p.partial = array<float>("partial", partial);
    p.output = array<void>("output", output);
    return linear;
}

BitserialWeight parse_weight(Address source, Address step, Address output, int64_t outer, int64_t channels,
                             int64_t inner, int64_t blocks, const std::vector<int>& coefficients, const Groups& groups,
                             const std::string& dtype, bool step_per_channel) {
    require_product("outer * channels * inner", {outer, channels, inner});
    require_from("blocks", blocks, 0);
    if (blocks > 0 && blocks != (inner + kWarpColumns - 1) / kWarpColumns) {
        fail("blocks", "of 128 columns of the weight", std::to_string(blocks));
    }
    BitserialWeight params{};
    params.outer = outer;
    params.channels = channels;
    params.inner = inner;
    params.plane_bytes = (outer * channels * inner + 7) / 8;
    params.blocks = blocks;
    for (const auto& group : parse_groups(groups, static_cast<int>(coefficients.size()))) {
        for (int i = 0; i < group.planes; ++i, ++params.planes) {
            params.group_of[params.planes] = group;
            params.exponents[params.planes] = group.exponent + group.planes - 1 - i;
            params.inverted[params.planes] = coefficients[params.planes] < 0;
        }
    }
    params.dtype = parse_dtype(dtype);
    params.step_per_channel = step_per_channel;
    params.source = array<const uint8_t>("source", source);
    if (blocks > 0) aligned("source", source);
    params.step = reinterpret_cast<const float*>(step);
    params.output = array<void>("output", output);
    return params;
}
#ifdef CSQ_WITH_CUDA
void prepare(Address input, Address prepared, Address steps, int64_t batch, int64_t columns, const std::string& dtype,
             const std::string& arithmetic, Address stream) {
    require_product("batch * columns", {batch, columns});
    cuda::BitserialInput params{};
    params.batch = batch;
    params.columns = columns;
    params.dtype = parse_dtype(dtype);
    params.arithmetic = parse_arithmetic(arithmetic);
    const bool scaled = params.arithmetic == cuda::Arithmetic::f16 && params.dtype == DType::bf16;
    if (!scaled && params.arithmetic != cuda::Arithmetic::i8) {
        fail("arithmetic", "as int8, or float16 for an input in bfloat16", arithmetic);
    }
    params.input = array<const void>("input", input);
    params.prepared = aligned("prepared", prepared);
    params.steps = array<float>("steps", steps);
    require_launched(cuda::bitserial_prepare(params, stream_of(stream)));
}
#endif

}  // namespace

void bind_bitserial_cuda(py::module_& m) {
    const auto linear = [&](const char* name, const char* doc, auto run, auto... last) {
        m.def(name, run, py::call_guard<py::gil_scoped_release>(), doc, py::arg("tiles"), py::arg("input"),
              py::arg("input_steps"), py::arg("step"), py::arg("bias"), py::arg("partial"), py::arg("output"),
              py::arg("batch"), py::arg("rows"), py::arg("blocks"), py::arg("planes"), py::arg("groups"),
              py::arg("arithmetic"), py::arg("dtype"), py::arg("step_per_row"), last...);
    };
    linear("emulate_cuda_bitserial_linear", "What cuda_bitserial_linear computes, on the processor.",
           [](Address tiles, Address input, Address input_steps, Address step, Address bias, Address partial,
              Address output, int64_t batch, int64_t rows, int64_t blocks, int planes, const Groups& groups,
              const std::string& arithmetic, const std::string& dtype, bool step_per_row) {
               const auto [params, parsed] =
                   parse_linear(tiles, input, input_steps, step, bias, partial, output, batch, rows, blocks, planes,
                                groups, arithmetic, dtype, step_per_row);
               emulate_linear(params, parsed);
           });
    const auto weight = [&](const char* name, const char* doc, auto run, auto... last) {
        m.def(name, run, py::call_guard<py::gil_scoped_release>(), doc, py::arg("source"), py::arg("step"),
              py::arg("output"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("blocks"),
              py::arg("coefficients"), py::arg("groups"), py::arg("dtype"), py::arg("step_per_channel"), last...);
    };
    weight("emulate_cuda_bitserial_weight", "What cuda_bitserial_weight computes in float32, on the processor.",
           [](Address source, Address step, Address output, int64_t outer, int64_t channels, int64_t inner,
              int64_t blocks, const std::vector<int>& coefficients, const Groups& groups, const std::string& dtype,
              bool step_per_channel) {
               emulate_weight(parse_weight(source, step, output, outer, channels, inner, blocks, coefficients, groups,
                                           dtype, step_per_channel));
           });
#ifdef CSQ_WITH_CUDA
    linear(
        "cuda_bitserial_linear", "Product with packed weights in the order of backends/gpu_planes.py.",
        [](Address tiles, Address input, Address input_steps, Address step, Address bias, Address partial,
           Address output, int64_t batch, int64_t rows, int64_t blocks, int planes, const Groups& groups,
           const std::string& arithmetic, const std::string& dtype, bool step_per_row, Address stream) {
            const auto [params, parsed] = parse_linear(tiles, input, input_steps, step, bias, partial, output, batch,
                                                       rows, blocks, planes, groups, arithmetic, dtype, step_per_row);
            require_launched(
                cuda::bitserial_linear(params, parsed.data(), static_cast<int>(parsed.size()), stream_of(stream)));
        },
        py::arg("stream"));
    m.def("cuda_bitserial_prepare", &prepare, py::call_guard<py::gil_scoped_release>(),
          "The input of a product as integers or scaled halves, with a step for each 128 columns.", py::arg("input"),
          py::arg("prepared"), py::arg("steps"), py::arg("batch"), py::arg("columns"), py::arg("dtype"),
          py::arg("arithmetic"), py::arg("stream"));
    weight(
        "cuda_bitserial_weight",
        "The weight, or without a step its codes, from canonical planes or, with blocks, from tiles.",
        [](Address source, Address step, Address output, int64_t outer, int64_t channels, int64_t inner, int64_t blocks,
           const std::vector<int>& coefficients, const Groups& groups, const std::string& dtype, bool step_per_channel,
           Address stream) {
            const auto params = parse_weight(source, step, output, outer, channels, inner, blocks, coefficients, groups,
                                             dtype, step_per_channel);
            require_launched(cuda::bitserial_weight(params, stream_of(stream)));
        },
        py::arg("stream"));
#endif
}

}  // namespace csq::python
