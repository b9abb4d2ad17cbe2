// Attention inside 4 x 4 blocks of a colour image, and the maximum of each block, forward and backward, without any
// dependency beyond the C++ library and the OpenMP runtime that torch has loaded.
//
// Of one head, with x_i the 3 colours of pixel i of a block and j over the block's 16 pixels:
//
//   S_ij = x_i . (A x_j + U_{row(j) - row(i)} + W_{column(j) - column(i)}),  A = W_Q^T W_K, U = W_Q^T r_row, W = W_Q^T r_column
//   P_ij = exp(S_ij) / sum_j exp(S_ij),  v_j = G_j x_j,  y_i = sum_j P_ij v_j,  top = max_i y_i
//
// (Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models", section 3.2 and appendix A.1.) Queries and
// keys are never formed: with three colours, their product is a form of nine numbers. G_j, the mixed projections, depend
// on the pixel's place alone; or v is a 4 x 4 convolution of the image. A batch norm between y and the maximum is a factor of G and a shift of the maximum.
//
//   dy_i = one_hot(i = argmax) g + offset + slope y_i      (the last two terms: a batch norm with the batch's statistics)
//   dS_ij = P_ij (dy_i . v_j - sum_j P_ij dy_i . v_j),  dv_j = sum_i P_ij dy_i,  and from there by the chain rule
//
// The 16 pixels of a block are the lanes of a vector, of queries (i), of keys (j) or of 16 channels in turn.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "stem_backward.h"
#include "stem_forward.h"

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
}

namespace {

// task(thread, begin, end) for consecutive ranges of [0, size), one per thread.
template <class F>
void parallel(int64_t size, int64_t threads, const F& task) {
  threads = std::max<int64_t>(1, std::min(threads, size));
  if (threads == 1) return task(int64_t(0), int64_t(0), size);
  struct Team {
    const F& task;
    int64_t size, threads;
    std::atomic<int64_t> next{0};
  } team{task, size, threads};
  auto member = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    // The runtime may give fewer threads than asked for.
    for (int64_t n; (n = team.next++) < team.threads;)
      team.task(n, team.size * n / team.threads, team.size * (n + 1) / team.threads);
  };
  GOMP_parallel(member, &team, unsigned(threads), 0);
}

}  // namespace

extern "C" int32_t sasa_stem_problem_bytes() { return sizeof(stem::Problem); }

extern "C" void sasa_stem_forward(const stem::Problem* problem) {
  const stem::Problem& p = *problem;
  const stem::Packed packed(p);
  parallel(p.batch * p.down(), p.threads, [&](int64_t thread, int64_t begin, int64_t end) {
    stem::ForwardRow scratch(p, packed);
    double* sums = p.sums ? p.sums + thread * 2 * p.all_channels() : nullptr;
    for (int64_t row = begin; row < end; ++row) forward_row(p, packed, row / p.down(), row % p.down(), scratch, sums);
  });
}

extern "C" void sasa_stem_backward(const stem::Problem* problem) {
  const stem::Problem& p = *problem;
  const stem::Packed packed(p);
  // A convolution's gradient of the image reaches into the next rows of blocks: first every other row, then the rest.
  const int64_t turns = p.filters && p.dx ? 2 : 1;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t rows = (p.down() - turn + turns - 1) / turns;
    parallel(p.batch * rows, p.threads, [&](int64_t thread, int64_t begin, int64_t end) {
      stem::BackwardRow sums(p, packed);
      double* dform = p.dform + thread * p.heads * stem::COLOURS * stem::FORM;
      double* dvalues = p.dvalues + thread * stem::TAPS * p.all_channels();
      for (int64_t row = begin; row < end; ++row) {
        backward_row(p, packed, row / rows, row % rows * turns + turn, sums);
        add_up(p, packed, sums, dform, dvalues);
      }
    });
  }
}
