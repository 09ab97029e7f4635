#include "cpu/memory.h"

#include <cstring>

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

int64_t read_pass(std::uintptr_t address, int64_t bytes, int threads) {
    constexpr int64_t kLine = 64, kAhead = 2048;
    const int64_t lines = bytes / kLine;
    const int team = threads < 1 ? 1 : threads;
    int64_t total = 0;
#pragma omp parallel for num_threads(team) schedule(static) reduction(+ : total)
    for (int member = 0; member < team; ++member) {
        const auto* end = reinterpret_cast<const char*>(address) + lines * (member + 1) / team * kLine;
        int64_t sums[4] = {};
        for (const auto* line = reinterpret_cast<const char*>(address) + lines * member / team * kLine; line < end;
             line += kLine) {
            __builtin_prefetch(line + kAhead);
            // One word of a line brings all of it.
            int64_t word;
            std::memcpy(&word, line, sizeof word);
            sums[(line - reinterpret_cast<const char*>(address)) / kLine % 4] += word;
        }
        total += sums[0] + sums[1] + sums[2] + sums[3];
    }
    return total;
}

}  // namespace csq::cpu
