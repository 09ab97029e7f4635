// OpenMP's parallel regions on threads that ThreadSanitizer sees begin and end: it knows nothing of libgomp's own,
// whose barriers it would take for races. Serves what GCC makes of `parallel for schedule(static)`, with or without
// reduction.
#include <thread>
#include <vector>

namespace {
thread_local int member = 0, team = 1;
}

extern "C" {

int omp_get_thread_num() { return member; }
int omp_get_num_threads() { return team; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
    const int size = threads == 0 ? 1 : static_cast<int>(threads);
    std::vector<std::thread> others;
    for (int i = 1; i < size; ++i) {
        others.emplace_back([=] {
            member = i, team = size;
            work(data);
        });
    }
    team = size;
    work(data);
    team = 1;
    for (std::thread& other : others) other.join();
}
}
