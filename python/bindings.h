// What each file here adds to csq_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace csq::python {

void bind_reconstruct(pybind11::module_& m);

}  // namespace csq::python
