// The three products of a window: queries by keys, weights by values, and its transpose. Strides are in vectors.
#pragma once

#include "vectors.h"

namespace SASA_ISA {

// done(i, j, s) of s = begin[i] + sum_c a[i][c] b[j][c], i < NA, j < n: a V, or a Wide for the keys j and j + 1. To begin
// with a term costs nothing, to add it afterwards does.
template <int D, int NA, class Done>
SASA_INLINE void dot(const V* const* a, const V* b, int64_t bs, int64_t n, int64_t d_, const V (&begin)[NA], Done done) {
  const int64_t d = D ? D : d_;
  const V* ap[NA];
  unroll<NA>([&](auto i) SASA_ALWAYS_INLINE { ap[i] = a[i]; });
  auto tile = [&]<int NB>(std::integral_constant<int, NB>, int64_t j) SASA_ALWAYS_INLINE {
    typedef std::conditional_t<wide<D>, Wide, V> T;
    T acc[NA][NB];
    const V* bp = b + j * bs;
    unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { acc[i][t] = and_zero<T>(begin[i]); });
    });
    for (int64_t c = 0; c < d; c += PARTS<T>) {
      T bv[NB];
      unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { bv[t] = load<T>(bp + t * bs + c); });
      unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
        T av = load<T>(ap[i] + c);
        unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { acc[i][t] += av * bv[t]; });
      });
    }
    unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
      if constexpr (PARTS<T> == 1) {
        unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { done(i, j + t, acc[i][t]); });
      } else {
        unroll<NB / 2>([&](auto t) SASA_ALWAYS_INLINE {
          done(i, j + 2 * t, halves_added(acc[i][2 * t], acc[i][2 * t + 1]));
        });
        if constexpr (NB % 2) done(i, j + NB - 1, sum_of(acc[i][NB - 1]));
      }
    });
  };
  int64_t j = 0;
  for (; j + KEYS <= n; j += KEYS) tile(std::integral_constant<int, KEYS>{}, j);
  if constexpr (KEYS > 3) {
    if (n - j == 3) return tile(std::integral_constant<int, 3>{}, j);
  }
  if constexpr (KEYS > 2) {
    if (n - j == 2) return tile(std::integral_constant<int, 2>{}, j);
  }
  if (n - j == 1) tile(std::integral_constant<int, 1>{}, j);
}

// acc[i][c] += sum_j w[i][j] b[j][c] for i in [LO, HI), c < N.
template <int LO, int HI, class T, int N>
SASA_INLINE void weighted_step(T (&acc)[ROWS][N], const V* const* w, int64_t wo, const V* b, int64_t bs, int64_t n) {
  const V* wp[ROWS];
  unroll<HI - LO>([&](auto i) SASA_ALWAYS_INLINE { wp[LO + i] = w[LO + i] + wo; });
  for (int64_t j = 0; j < n; ++j, b += bs) {
    T bv[N];
    unroll<N>([&](auto c) SASA_ALWAYS_INLINE { bv[c] = load<T>(b + c * PARTS<T>); });
    unroll<HI - LO>([&](auto i) SASA_ALWAYS_INLINE {
      T wv = spread<T>(wp[LO + i][j]);
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[LO + i][c] += wv * bv[c]; });
    });
  }
}

template <class T, int N>
SASA_INLINE void weighted(T (&acc)[ROWS][N], int lo, int hi, const V* const* w, int64_t wo, const V* b, int64_t bs,
                          int64_t n) {
#define SASA_STEP(LO, HI) \
  case LO * 8 + HI:       \
    return weighted_step<LO, HI>(acc, w, wo, b, bs, n);
  switch (lo * 8 + hi) {
    SASA_STEP(0, 1) SASA_STEP(0, 2) SASA_STEP(0, 3) SASA_STEP(0, 4) SASA_STEP(1, 2)
    SASA_STEP(1, 3) SASA_STEP(1, 4) SASA_STEP(2, 3) SASA_STEP(2, 4) SASA_STEP(3, 4)
  }
#undef SASA_STEP
}

// b[j][c] += sum_i w[i][j] a[i][c] for i < NA, j < n, c < d.
template <int D, int NA>
SASA_INLINE void outer(const V* const* w, const V* const* a, V* b, int64_t bs, int64_t n, int64_t d_) {
  const int64_t d = D ? D : d_;
  auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
    T av[NA][N];
    unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { av[i][c] = load<T>(a[i] + c0 + c * PARTS<T>); });
    });
    V* bp = b + c0;
    for (int64_t j = 0; j < n; ++j, bp += bs) {
      T acc[N];
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[c] = load<T>(bp + c * PARTS<T>); });
      unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
        T wv = spread<T>(w[i][j]);
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[c] += wv * av[i][c]; });
      });
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(bp + c * PARTS<T>, acc[c]); });
    }
  };
  by_channels<D>(d, columns);
}

template <class F>
SASA_INLINE void with_count(int n, F&& f) {
  static_assert(ROWS == 4);
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
  }
}

}  // namespace SASA_ISA
