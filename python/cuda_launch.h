// What the bindings of CUDA kernels share.
#pragma once

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/launch.h"

namespace csq::python {

inline cuda::Stream stream_of(Address address) { return reinterpret_cast<cuda::Stream>(address); }

// Reported as RuntimeError.
inline void require_launched(const cuda::LaunchStatus& status) {
    if (status.reason != nullptr) {
        throw std::runtime_error("expected " + std::string(status.kernel) + " to launch, got " + status.reason);
    }
}

}  // namespace csq::python
