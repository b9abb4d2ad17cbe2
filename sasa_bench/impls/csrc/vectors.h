// Vectors of LANES planes, and what the kernels compute with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512VL__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SASA_ISA
#error "SASA_ISA must name the build"
#endif

#include "kernel_table.h"

// Everything inlines into one loop nest, except under a sanitizer, which would take minutes to compile that.
#ifdef SASA_SANITIZE
#define SASA_ALWAYS_INLINE
#else
#define SASA_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define SASA_INLINE inline SASA_ALWAYS_INLINE

namespace SASA_ISA {

using sasa::Planes;
using sasa::Problem;
using sasa::Scalar;

#if defined(__AVX512VL__)
constexpr int LANES = 8, ROWS = 4, KEYS = 4, CHANNELS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4, KEYS = 2, CHANNELS = 2;
#else
constexpr int LANES = 4, ROWS = 4, KEYS = 2, CHANNELS = 2;
#endif
constexpr int STRIP = 4;       // blocks of ROWS queries that take turns with a key row
constexpr int64_t CHUNK = 64;  // keys per query whose logits are held at once: STRIP * ROWS * CHUNK vectors fit in L1

typedef float V __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * LANES), may_alias));

constexpr float LOG2E = 1.44269504088896340736f;

SASA_INLINE V splat(float x) { return x - V{}; }

// The larger of the two; b where either is NaN.
SASA_INLINE V vmax(V a, V b) {
#if defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of the two; b where either is NaN.
SASA_INLINE V vmin(V a, V b) {
#if defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

#if defined(__AVX512VL__)
SASA_INLINE V times_exp2(V x, V n) { return (V)_mm256_scalef_ps((__m256)x, (__m256)n); }
#endif

// Wide: what the products, the maxima and the exponentials are computed in. SASA_WIDE makes it two vectors side by side,
// two channels of a pixel or two keys of a query; the layout of the data stays the same.
#ifdef SASA_WIDE
typedef float Wide __attribute__((vector_size(8 * LANES)));
constexpr int WIDTH = 2;

SASA_INLINE Wide vmax(Wide a, Wide b) { return (Wide)_mm512_max_ps((__m512)a, (__m512)b); }
SASA_INLINE Wide times_exp2(Wide x, Wide n) { return (Wide)_mm512_scalef_ps((__m512)x, (__m512)n); }

SASA_INLINE V low(Wide a) { return (V)_mm512_castps512_ps256((__m512)a); }
SASA_INLINE V high(Wide a) { return (V)_mm512_extractf32x8_ps((__m512)a, 1); }
// The halves of a added, beside those of b. One shuffle, since the products wait for the unit that shuffles.
SASA_INLINE Wide halves_added(Wide a, Wide b) {
  return (Wide)_mm512_mask_blend_ps(0xff00, (__m512)a, (__m512)b) +
         (Wide)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x4e);
}

SASA_INLINE Wide join(V a, V b) {
  return (Wide)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1);
}

SASA_INLINE V sum_of(Wide a) { return low(a) + high(a); }
SASA_INLINE V largest_of(Wide a) { return vmax(low(a), high(a)); }
#else
typedef V Wide;
constexpr int WIDTH = 1;
#endif

SASA_INLINE V sum_of(V a) { return a; }
SASA_INLINE V largest_of(V a) { return a; }

template <class T>
constexpr int PARTS = sizeof(T) / sizeof(V);  // vectors in a T

// A T with x in every part, and one with x in the first.
template <class T>
SASA_INLINE T spread(V x) {
  return x;
}
template <class T>
SASA_INLINE T and_zero(V x) {
  return x;
}
#ifdef SASA_WIDE
template <>
SASA_INLINE Wide spread<Wide>(V x) {
  return (Wide)_mm512_broadcast_f32x8((__m256)x);
}
template <>
SASA_INLINE Wide and_zero<Wide>(V x) {
  return (Wide)_mm512_zextps256_ps512((__m256)x);
}
#endif

template <class T>
SASA_INLINE void add(Wide& sum, T x) {
  if constexpr (sizeof x == sizeof sum)
    sum += x;
  else
    sum += and_zero<Wide>(x);
}
template <class T>
SASA_INLINE void raise(Wide& top, T x) {
  if constexpr (sizeof x == sizeof top)
    top = vmax(x, top);
  else
    top = vmax(spread<Wide>(x), top);
}

template <class T>
SASA_INLINE T load(const V* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
SASA_INLINE void store(V* p, T x) { std::memcpy(p, &x, sizeof x); }

// e^x = 2^n 2^f with |f| <= 1/2 by a minimax polynomial of degree 5, relative error below 2.2e-7, for |x| < 87.
template <class T>
SASA_INLINE T exponential(T x) {
  const T shifted = x * LOG2E + 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are the nearest integer
  const T n = shifted - 12582912.0f, f = x * LOG2E - n;
  T p = f * 0x1.5c08e6p-10f + 0x1.3d0c52p-7f;
  p = p * f + 0x1.c6b6e4p-5f;
  p = p * f + 0x1.ebf918p-3f;
  p = p * f + 0x1.62e428p-1f;
  p = p * f + 1.0f;
#if defined(__AVX512VL__)
  return times_exp2(p, n);
#else
  return (T)((VI)p + ((VI)shifted << 23));
#endif
}

// e^x for x < 87; under 2^-125 for very negative x; NaN for the NaN that arithmetic makes.
template <class T>
SASA_INLINE T expv(T x) {
  return exponential(vmax(T{} - 87.33f, x));
}

// Sums of a softmax between 1 / DIRECT and DIRECT have all their digits without the largest logit taken off.
constexpr float DIRECT = 0x1p40f, DIRECT_LOGIT = 20;

constexpr float NONE = -std::numeric_limits<float>::max();  // the logit of a key that is not there

// As expv for |x| < 87. For other x no value that leaves a sum within the bounds of DIRECT unless it belongs there.
template <class T>
SASA_INLINE T exp_near(T x) {
#if defined(__AVX512VL__)
  return exponential(x);
#else
  return exponential(vmin(T{} + 88.0f, vmax(T{} - 87.33f, x)));
#endif
}

SASA_INLINE bool all(VI mask) {
  int32_t every = -1;
  for (int l = 0; l < LANES; ++l) every &= mask[l];
  return every != 0;
}

template <int N, class F>
SASA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) SASA_ALWAYS_INLINE {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// What the compiler knows of a number of channels: that it is D; where D is negative, that it is a multiple of -D; where D is 0,
// nothing.
template <int D>
SASA_INLINE int64_t known(int64_t d) {
  return D > 0 ? D : d;
}

// Whether so many channels are computed as Wide.
template <int D>
constexpr bool wide = WIDTH > 1 && D != 0 && D % (2 * WIDTH) == 0;

template <class T, int N>
struct Piece {};  // N vectors T of channels

// f(piece, c) over the d channels in the largest pieces that registers allow, then one by one.
template <int D, class F>
SASA_INLINE void by_channels(int64_t d, F f) {
  if constexpr (wide<D>) {
    constexpr int N = std::min(CHANNELS, (D < 0 ? -D : D) / WIDTH);
    static_assert(D % (N * WIDTH) == 0);
    for (int64_t c = 0; c < known<D>(d); c += N * WIDTH) f(Piece<Wide, N>{}, c);
  } else {
    int64_t c = 0;
    for (; c + CHANNELS <= d; c += CHANNELS) f(Piece<V, CHANNELS>{}, c);
    if constexpr (D % CHANNELS != 0 || D == 0)
      for (; c < d; ++c) f(Piece<V, 1>{}, c);
  }
}

}  // namespace SASA_ISA
