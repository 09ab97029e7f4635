// What each file here adds to csq_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace csq::python {

using Address = std::uintptr_t;

// Reported as ValueError.
[[noreturn]] inline void fail(const std::string& name, const std::string& expected, const std::string& got) {
    throw std::invalid_argument("expected " + name + " " + expected + ", got " + got);
}

template <class T>
T* array(const char* name, Address address) {
    if (address == 0) fail(name, "as the address of an array", "0");
    return reinterpret_cast<T*>(address);
}

inline void require_from(const char* name, int64_t value, int64_t least) {
    if (value < least) fail(name, "of at least " + std::to_string(least), std::to_string(value));
}

void bind_bitserial(pybind11::module_& m);
void bind_bitserial_cuda(pybind11::module_& m);
void bind_reconstruct(pybind11::module_& m);
void bind_step(pybind11::module_& m);

}  // namespace csq::python
