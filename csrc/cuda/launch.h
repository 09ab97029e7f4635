// What every launcher of kernels takes and returns.
#pragma once

struct CUstream_st;

namespace csq::cuda {

using Stream = CUstream_st*;

// Whether a launch was accepted: reason is null if so, else the runtime's text, and kernel names the one refused.
struct LaunchStatus {
    const char* kernel = nullptr;
    const char* reason = nullptr;
};

}  // namespace csq::cuda
