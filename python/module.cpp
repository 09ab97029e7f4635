// csq_kernels._C: the kernels as functions of addresses and sizes. It knows neither torch nor numpy, and allocates
// nothing but scratch memory.
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> words;
    std::istringstream stream(list);
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const auto isa : csq::cpu::kIsas) {
        if (csq::cpu::isa_supported(isa)) names.emplace_back(csq::cpu::isa_name(isa));
    }
    return names;
}

void set_isa(const std::string& name) {
    std::string supported;
    for (const auto isa : csq::cpu::kIsas) {
        if (!csq::cpu::isa_supported(isa)) continue;
        if (name == csq::cpu::isa_name(isa)) return csq::cpu::force_isa(isa);
        supported += (supported.empty() ? "" : ", ") + std::string(csq::cpu::isa_name(isa));
    }
    throw std::invalid_argument("expected name of an instruction set of this processor (" + supported + "), got " +
                                name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of csq_kernels on addresses and sizes; every array is contiguous.";
    m.attr("compiler") = CSQ_COMPILER;
    m.attr("cuda_architectures") = split(CSQ_CUDA_ARCHITECTURES);
    m.def("isa", [] { return csq::cpu::isa_name(csq::cpu::current_isa()); }, "Instruction set that the kernels use.");
    m.def("supported_isas", &supported_isas, "Instruction sets that this processor and this build can run.");
    m.def("set_isa", &set_isa, "Use this instruction set from now on; ValueError if it is not supported.",
          py::arg("name"));
    m.def("advise_huge_pages", &csq::cpu::advise_huge_pages,
          "Ask for large pages under memory that was allocated and not touched yet.", py::arg("address"),
          py::arg("bytes"));
    m.def("read_bandwidth_pass", &csq::cpu::read_pass, py::call_guard<py::gil_scoped_release>(),
          "Read memory once, as fast as it comes, and return a sum of what was read.", py::arg("address"),
          py::arg("bytes"), py::arg("threads"));
    csq::python::bind_bitserial(m);
    csq::python::bind_bitserial_cuda(m);
    csq::python::bind_reconstruct(m);
    csq::python::bind_step(m);
}
