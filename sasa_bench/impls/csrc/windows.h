// The three products of a window: queries by keys, weights by values, and its transpose. Strides are in vectors. What there is
// for each key and query, such as logits, lies as [key][ROWS].
#pragma once

#include "vectors.h"

namespace SASA_ISA {

// Where a sum of `dot` belongs in [key][ROWS] and in [ROWS], from the first of its queries on.
template <int I>
struct OneQuery {  // I
  int64_t key;
  SASA_INLINE V of_key(const V* all) const { return all[key * ROWS + I]; }
  SASA_INLINE V of_query(const V* each) const { return each[I]; }
  SASA_INLINE void store(V* all, V x) const { all[key * ROWS + I] = x; }
  SASA_INLINE void add_to(V* each, V x) const { each[I] += x; }
  SASA_INLINE void raise(V* each, V x) const { each[I] = vmax(x, each[I]); }
};
#ifdef SASA_WIDE
template <int I>
struct TwoQueries {  // I and I + 1
  int64_t key;
  SASA_INLINE Wide of_key(const V* all) const { return load<Wide>(all + key * ROWS + I); }
  SASA_INLINE Wide of_query(const V* each) const { return load<Wide>(each + I); }
  SASA_INLINE void store(V* all, Wide x) const { SASA_ISA::store(all + key * ROWS + I, x); }
  SASA_INLINE void add_to(V* each, Wide x) const { SASA_ISA::store(each + I, load<Wide>(each + I) + x); }
  SASA_INLINE void raise(V* each, Wide x) const { SASA_ISA::store(each + I, vmax(x, load<Wide>(each + I))); }
};
#endif

// N queries; ODD: the first of them has an odd number in its block, so that pairs begin with the second.
template <int N, bool ODD>
struct Some {
  static constexpr int COUNT = N, PAIRS = ODD ? 1 : 0;
};

// work(Some, lo) for the queries [lo, hi) of a block.
template <class Work>
SASA_INLINE void with_queries(int lo, int hi, Work&& work) {
  static_assert(ROWS == 4);
  switch (hi - lo) {
    case 4: return work(Some<4, false>(), 0);
    case 3: return lo ? work(Some<3, true>(), 1) : work(Some<3, false>(), 0);
    case 2:
      if (lo % 2 == 0) return work(Some<2, false>(), lo);
      work(Some<1, false>(), lo++);
      [[fallthrough]];
    case 1: return work(Some<1, false>(), lo);
  }
}

// done(at, s) of s = begin[i] + sum_c a[i][c] b[j][c] for the queries i and the keys j < n, where `at` is one of the above.
// To begin with a term costs nothing, to add it afterwards does.
template <int D, class Queries, class Done>
SASA_INLINE void dot(Queries, const V* const* a, const V* b, int64_t bs, int64_t n, int64_t d_,
                     const V (&begin)[Queries::COUNT], Done done) {
  constexpr int NA = Queries::COUNT;
  const int64_t d = known<D>(d_);
  const V* ap[NA];
  unroll<NA>([&](auto i) SASA_ALWAYS_INLINE { ap[i] = a[i]; });
  auto tile = [&]<int NB>(std::integral_constant<int, NB>, int64_t j) SASA_ALWAYS_INLINE {
    typedef std::conditional_t<wide<D>, Wide, V> T;
    T acc[NA][NB];
    const V* bp = b + j * bs;
    unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { acc[i][t] = and_zero<T>(begin[i]); });
    });
#pragma GCC unroll 2
    for (int64_t c = 0; c < d; c += PARTS<T>) {
      T bv[NB];
      unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { bv[t] = load<T>(bp + t * bs + c); });
      unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
        T av = load<T>(ap[i] + c);
        unroll<NB>([&](auto t) SASA_ALWAYS_INLINE { acc[i][t] += av * bv[t]; });
      });
    }
    unroll<NB>([&](auto t) SASA_ALWAYS_INLINE {
      unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
#ifdef SASA_WIDE
        constexpr bool pairs = PARTS<T> > 1;
        if constexpr (pairs && i >= Queries::PAIRS && (i - Queries::PAIRS) % 2 == 0 && i + 1 < NA)
          done(TwoQueries<i>{j + t}, halves_added(acc[i][t], acc[i + 1][t]));
        else if constexpr (!pairs || i < Queries::PAIRS || (i - Queries::PAIRS) % 2 == 0)
#endif
          done(OneQuery<i>{j + t}, sum_of(acc[i][t]));
      });
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

// acc[i][c] += sum_j w[j][i] b[j][c] for i in [LO, HI), c < N.
template <int LO, int HI, class T, int N>
SASA_INLINE void weighted_step(T (&acc)[ROWS][N], const V* w, const V* b, int64_t bs, int64_t n) {
  for (int64_t j = 0; j < n; ++j, b += bs, w += ROWS) {
    T bv[N];
    unroll<N>([&](auto c) SASA_ALWAYS_INLINE { bv[c] = load<T>(b + c * PARTS<T>); });
    unroll<HI - LO>([&](auto i) SASA_ALWAYS_INLINE {
      T wv = spread<T>(w[LO + i]);
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[LO + i][c] += wv * bv[c]; });
    });
  }
}

template <class T, int N>
SASA_INLINE void weighted(T (&acc)[ROWS][N], int lo, int hi, const V* w, const V* b, int64_t bs, int64_t n) {
#define SASA_STEP(LO, HI) \
  case LO * 8 + HI:       \
    return weighted_step<LO, HI>(acc, w, b, bs, n);
  switch (lo * 8 + hi) {
    SASA_STEP(0, 1) SASA_STEP(0, 2) SASA_STEP(0, 3) SASA_STEP(0, 4) SASA_STEP(1, 2)
    SASA_STEP(1, 3) SASA_STEP(1, 4) SASA_STEP(2, 3) SASA_STEP(2, 4) SASA_STEP(3, 4)
  }
#undef SASA_STEP
}

// b[j][c] += sum_i w[j][i] a[i][c] for i < NA, j < n, c < d.
template <int D, int NA>
SASA_INLINE void outer(const V* w, const V* const* a, V* b, int64_t bs, int64_t n, int64_t d_) {
  const int64_t d = known<D>(d_);
  auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
    T av[NA][N];
    unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { av[i][c] = load<T>(a[i] + c0 + c * PARTS<T>); });
    });
    V* bp = b + c0;
    const V* wp = w;
    for (int64_t j = 0; j < n; ++j, bp += bs, wp += ROWS) {
      T acc[N];
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[c] = load<T>(bp + c * PARTS<T>); });
      unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
        T wv = spread<T>(wp[i]);
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE { acc[c] += wv * av[i][c]; });
      });
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(bp + c * PARTS<T>, acc[c]); });
    }
  };
  by_channels<D>(d, columns);
}

}  // namespace SASA_ISA
