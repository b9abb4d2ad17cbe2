// at::parallel_for for every compiler, on the OpenMP runtime that torch has loaded and sets the threads of.
//
// The pragma of at::parallel_for becomes a call of GOMP_parallel with g++, and with clang a call that only LLVM's own
// runtime has, a second one beside torch's libgomp. LLVM's and Intel's runtimes have GOMP_parallel too, so it is called
// here by name.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace sasa {

// f(begin, end) for ranges that together are [0, size), one per thread.
template <class F>
void parallel_for(int64_t size, const F& f) {
  if (size <= 0) return;
  if (size == 1 || at::in_parallel_region() || at::get_num_threads() == 1) {
    c10::ParallelGuard guard(true);
    f(int64_t(0), size);
    return;
  }
  struct Team {
    const F& f;
    int64_t size;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } team{f, size};
  auto member = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), team.size);
    const int64_t share = (team.size + threads - 1) / threads, begin = omp_get_thread_num() * share;
    if (begin >= team.size) return;
    try {
      c10::ParallelGuard guard(true);
      team.f(begin, std::min(team.size, begin + share));
    } catch (...) {
      if (!team.failed.test_and_set()) team.error = std::current_exception();
    }
  };
  GOMP_parallel(member, &team, 0, 0);
  if (team.error) std::rethrow_exception(team.error);
}

}  // namespace sasa
