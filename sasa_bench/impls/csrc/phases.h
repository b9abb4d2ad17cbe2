// Where the time of a kernel goes, counted by a build with SASA_PHASES, which is for profiles only.
//
// SASA_PHASE(x) says that from here on the time of this thread belongs to phase x; `none` stops the clock.
#pragma once

#ifndef SASA_PHASES
#define SASA_PHASE(x) static_cast<void>(0)
#else

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace {  // the libraries of one process have clocks of their own

enum class Phase { project, interleave, position, logits, softmax, aggregate, gradients, write, none };
constexpr int PHASES = int(Phase::none);

inline uint64_t phase_ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

struct PhaseClock {
  uint64_t ticks[PHASES + 1] = {};
  uint64_t since = 0;
  Phase phase = Phase::none;
  PhaseClock* next = nullptr;

  void enter(Phase to) {
    const uint64_t now = phase_ticks();
    ticks[int(phase)] += now - since;
    since = now;
    phase = to;
  }
};

std::atomic<PhaseClock*> phase_clocks{nullptr};

// Clocks outlive their threads: a pool may end one while its ticks are still to be read.
inline PhaseClock& phase_clock() {
  thread_local PhaseClock* const clock = [] {
    auto* made = new PhaseClock;
    made->next = phase_clocks;
    while (!phase_clocks.compare_exchange_weak(made->next, made)) {
    }
    return made;
  }();
  return *clock;
}

}  // namespace

#define SASA_PHASE(x) phase_clock().enter(Phase::x)

// The ticks of every thread by phase since the last call, and the time now in ticks; no kernel may run meanwhile.
extern "C" void sasa_phases(uint64_t* by_phase, uint64_t* now) {
  for (int i = 0; i < PHASES; ++i) by_phase[i] = 0;
  for (PhaseClock* clock = phase_clocks; clock; clock = clock->next)
    for (int i = 0; i < PHASES; ++i) {
      by_phase[i] += clock->ticks[i];
      clock->ticks[i] = 0;
    }
  *now = phase_ticks();
}

#endif
