// Local self-attention on planes, forward (forward.h) and backward (backward.h), without any dependency beyond the C++ library.
//
// A "plane" is one head of one image. LANES planes are interleaved so that a vector holds one channel of one pixel
// of LANES planes, and the kernels below are scalar local attention with `float` replaced by that vector: every load
// is aligned, every window is clipped exactly at the border, and no lane is lost to the width of the image.
//
//   y_i = sum_j P_ij v_j,  P_ij = exp(S_ij) / sum_j exp(S_ij),  S_ij = q_i.k_j + q_i.r_{j-i},  j in the window of i
//   (Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models", eq. 2 and 4)
//   dS_ij = P_ij (dy_i.v_j - dy_i.y_i),  dq_i = sum_j dS_ij (k_j + r_{j-i}),  dk_j = sum_i dS_ij q_i,
//   dv_j = sum_i P_ij dy_i,  dr_o = sum_i dS_{i,i+o} q_i
#pragma once

#include "task.h"

namespace SASA_ISA {

// Heads of 4, 8 and 16 channels have kernels of their own, and the other multiples of 8 have one together: it is as fast. Up to
// SASA_WIDEST: tests that compile fewer take a fraction of the compiler's time.
#ifndef SASA_WIDEST
#define SASA_WIDEST 64
#endif

template <class F>
inline void with_width(int64_t d, F&& f) {
  switch (d) {
#if SASA_WIDEST >= 8
    case 8: return f(std::integral_constant<int, 8>{});
#endif
#if SASA_WIDEST > 8
    case 4: return f(std::integral_constant<int, 4>{});
    case 16: return f(std::integral_constant<int, 16>{});
#endif
    default: break;
  }
#if SASA_WIDEST > 8
  if (d % 8 == 0) return f(std::integral_constant<int, -8>{});
#endif
  f(std::integral_constant<int, 0>{});
}

}  // namespace SASA_ISA
