#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace csq::cpu {

void advise_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
    const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage;
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
    // Advice that is refused changes nothing but the time.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace csq::cpu
