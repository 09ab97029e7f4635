// What the kernels ask of memory, and what it can give.
#pragma once

#include <cstdint>

namespace csq::cpu {

// Ask for pages of 2 MiB under the whole ones of them in this range: the first write to 64 MiB then costs 4 ms, not 37.
// Does nothing where the system offers none.
void advise_huge_pages(std::uintptr_t address, int64_t bytes);

// Read whole lines of 64 bytes, each once, as fast as they come; returns a sum of them. What a kernel that streams its
// weights is measured against.
int64_t read_pass(std::uintptr_t address, int64_t bytes, int threads);

}  // namespace csq::cpu
