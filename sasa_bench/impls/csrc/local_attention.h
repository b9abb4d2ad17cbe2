// Local self-attention on planes, forward and backward, without any dependency beyond the C++ library.
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

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

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
constexpr int64_t CHUNK = 80;  // keys per query whose logits are held at once: ROWS * CHUNK vectors fit in L1

typedef float V __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * LANES), may_alias));

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

SASA_INLINE V splat(float x) { return x - V{}; }

// The larger of the two; b where either is NaN.
SASA_INLINE V vmax(V a, V b) {
#if defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512VL__)
SASA_INLINE V nearest(V x) { return (V)_mm256_roundscale_ps((__m256)x, 0); }
SASA_INLINE V times_exp2(V x, V n) { return (V)_mm256_scalef_ps((__m256)x, (__m256)n); }
#endif

// Wide: what the products, the maxima and the exponentials are computed in. SASA_WIDE makes it two vectors side by side,
// two channels of a pixel or two keys of a query; the layout of the data stays the same.
#ifdef SASA_WIDE
typedef float Wide __attribute__((vector_size(8 * LANES)));
constexpr int WIDTH = 2;

SASA_INLINE Wide vmax(Wide a, Wide b) { return (Wide)_mm512_max_ps((__m512)a, (__m512)b); }
SASA_INLINE Wide nearest(Wide x) { return (Wide)_mm512_roundscale_ps((__m512)x, 0); }
SASA_INLINE Wide times_exp2(Wide x, Wide n) { return (Wide)_mm512_scalef_ps((__m512)x, (__m512)n); }

SASA_INLINE V low(Wide a) { return (V)_mm512_castps512_ps256((__m512)a); }
SASA_INLINE V high(Wide a) { return (V)_mm512_extractf32x8_ps((__m512)a, 1); }
// The halves of a added, beside those of b. One shuffle, since the products wait for the unit that shuffles.
SASA_INLINE Wide halves_added(Wide a, Wide b) {
  return (Wide)_mm512_mask_blend_ps(0xff00, (__m512)a, (__m512)b) +
         (Wide)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x4e);
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

// 2^x for x <= 128, relative error below 2.2e-7; 0 (or under 2^-125) for very negative x; NaN for NaN.
// Minimax polynomial of degree 5 on [-1/2, 1/2] after splitting off the nearest integer.
template <class T>
SASA_INLINE T exp2v(T x) {
  x = vmax(T{} - 126.0f, x);
#if defined(__AVX512VL__)
  T n = nearest(x);
#else
  T shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are the nearest integer
  T n = shifted - 12582912.0f;
#endif
  T f = x - n;
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

template <int N, class F>
SASA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) SASA_ALWAYS_INLINE {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Whether D channels, known in advance, are computed as Wide.
template <int D>
constexpr bool wide = WIDTH > 1 && D > 0 && D % (2 * WIDTH) == 0;

template <class T, int N>
struct Piece {};  // N vectors T of channels

// f(piece, c) over the d channels in the largest pieces that registers allow, then one by one.
template <int D, class F>
SASA_INLINE void by_channels(int64_t d, F f) {
  if constexpr (wide<D>) {
    constexpr int N = std::min(CHANNELS, D / WIDTH);
    static_assert(D % (N * WIDTH) == 0);
    for (int64_t c = 0; c < D; c += N * WIDTH) f(Piece<Wide, N>{}, c);
  } else {
    int64_t c = 0;
    for (; c + CHANNELS <= d; c += CHANNELS) f(Piece<V, CHANNELS>{}, c);
    if constexpr (D % CHANNELS != 0 || D == 0)
      for (; c < d; ++c) f(Piece<V, 1>{}, c);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The three kernels. Strides are in vectors.

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

// ---------------------------------------------------------------------------------------------------------------
// Interleaving

SASA_INLINE float widen(float x) { return x; }
SASA_INLINE float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <class T>
SASA_INLINE T narrow(float x);
template <>
SASA_INLINE float narrow<float>(float x) {
  return x;
}
template <>
SASA_INLINE uint16_t narrow<uint16_t>(float x) {  // to bfloat16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Lanes of a and b in turns of h: those that a transposition by blocks of h x h puts into its first or second vector.
template <int h, bool second>
constexpr int transposed_lane(int l) {
  return second ? ((l & h) ? LANES + l : l + h) : ((l & h) ? LANES + l - h : l);
}

template <int h, bool second, int... l>
SASA_INLINE V interleave(V a, V b, std::integer_sequence<int, l...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, transposed_lane<h, second>(l)...);
#else
  return __builtin_shuffle(a, b, VI{transposed_lane<h, second>(l)...});
#endif
}

SASA_INLINE void transpose(V (&r)[LANES]) {
  auto stage = [&](auto step) SASA_ALWAYS_INLINE {
    constexpr int h = 1 << step;
    constexpr auto all = std::make_integer_sequence<int, LANES>();
    unroll<LANES>([&](auto i) SASA_ALWAYS_INLINE {
      if constexpr ((i & h) == 0) {
        V a = r[i], b = r[i + h];
        r[i] = interleave<h, false>(a, b, all);
        r[i + h] = interleave<h, true>(a, b, all);
      }
    });
  };
  unroll<(LANES == 8 ? 3 : 2)>(stage);
}

template <class T>
SASA_INLINE V load_pixels(const T* p) {
  if constexpr (sizeof(T) == 4) {
    V out;
    std::memcpy(&out, p, sizeof out);
    return out;
  } else {
    typedef uint16_t H __attribute__((vector_size(2 * LANES)));
    H h;
    std::memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, VI) << 16);
  }
}

template <class T>
SASA_INLINE void store_pixels(T* p, V v) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, sizeof v);
  } else {
    for (int l = 0; l < LANES; ++l) p[l] = narrow<T>(v[l]);
  }
}

// The addresses of a tensor's LANES planes from `first` on. Lanes past the last plane repeat it.
template <class T>
struct Lanes {
  T* base[LANES];
  int64_t channel;
  int count;
  Lanes(const Planes& t, const Problem& p, int64_t first, int64_t channels) : channel(t.channel) {
    count = int(std::min<int64_t>(LANES, p.planes - first));
    for (int l = 0; l < LANES; ++l) {
      int64_t plane = first + std::min(l, count - 1);
      base[l] = static_cast<T*>(t.data) + (plane / p.heads) * t.image + (plane % p.heads) * channels * t.channel;
    }
  }
};

// Pixels [from, from + count) of `channels` channels of LANES planes -> out[pixel][channel], times scale.
template <class T>
void interleave_as(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from, int64_t count,
                   V* out, float scale) {
  Lanes<T> lanes(t, p, first, channels);
  if (count < LANES) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) {
        V v;
        for (int l = 0; l < LANES; ++l) v[l] = widen(lanes.base[l][c * lanes.channel + from + i]);
        out[i * channels + c] = v * scale;
      }
    return;
  }
  for (int64_t i = 0;; i = std::min(i + LANES, count - LANES)) {
    for (int64_t c = 0; c < channels; ++c) {
      V r[LANES];
      const int64_t at = c * lanes.channel + from + i;
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE {
        r[l] = load_pixels(lanes.base[l] + at);
        // LANES * channels streams are more than the hardware prefetcher follows.
        __builtin_prefetch(lanes.base[l] + at + 64);
      });
      transpose(r);
      V* o = out + i * channels + c;
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { o[l * channels] = r[l] * scale; });
    }
    if (i + LANES >= count) return;
  }
}

// The inverse of interleave_as; lanes past the last plane are dropped.
template <class T>
void separate_as(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from, int64_t count,
                 const V* in, float scale) {
  Lanes<T> lanes(t, p, first, channels);
  if (count < LANES) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) {
        V v = in[i * channels + c] * scale;
        for (int l = 0; l < lanes.count; ++l) lanes.base[l][c * lanes.channel + from + i] = narrow<T>(v[l]);
      }
    return;
  }
  for (int64_t i = 0;; i = std::min(i + LANES, count - LANES)) {
    for (int64_t c = 0; c < channels; ++c) {
      V r[LANES];
      const V* o = in + i * channels + c;
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { r[l] = o[l * channels] * scale; });
      transpose(r);
      const int64_t at = c * lanes.channel + from + i;
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE {
        if (l < lanes.count) store_pixels(lanes.base[l] + at, r[l]);
      });
    }
    if (i + LANES >= count) return;
  }
}

inline void interleave(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from,
                       int64_t count, V* out, float scale = 1.0f) {
  if (t.scalar == Scalar::bfloat16)
    interleave_as<uint16_t>(t, p, first, channels, from, count, out, scale);
  else
    interleave_as<float>(t, p, first, channels, from, count, out, scale);
}

inline void separate(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from, int64_t count,
                     const V* in, float scale = 1.0f) {
  if (t.scalar == Scalar::bfloat16)
    separate_as<uint16_t>(t, p, first, channels, from, count, in, scale);
  else
    separate_as<float>(t, p, first, channels, from, count, in, scale);
}

// Where the group of planes from `first` on begins in an interleaved tensor.
SASA_INLINE V* interleaved(const Planes& t, const Problem& p, int64_t first) {
  return reinterpret_cast<V*>(static_cast<float*>(t.data) + (first / p.heads) * t.image +
                              (first % p.heads) / LANES * t.group);
}

// count pixels of d vectors, ts apart -> out[pixel][channel], os apart, times scale.
SASA_INLINE void copy_pixels(const V* t, int64_t ts, V* out, int64_t os, int64_t count, int64_t d, float scale = 1.0f) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; ++c) out[i * os + c] = t[i * ts + c] * scale;
}

// ---------------------------------------------------------------------------------------------------------------
// Working memory

// Rows of interleaved pixels. Row y lives in slot y % slots, so a window of `slots` rows can slide over a plane.
struct Rows {
  V* base = nullptr;
  int64_t slots = 1, row = 0;  // row: vectors per row
  V* operator()(int64_t y) const { return base + (y % slots) * row; }
  // f(y, count, address) for every run of rows in [from, to) that is contiguous.
  template <class F>
  void runs(int64_t from, int64_t to, F f) const {
    while (from < to) {
      int64_t count = std::min(to - from, slots - from % slots);
      f(from, count, (*this)(from));
      from += count;
    }
  }
};

// One growing block per thread. Kept between calls while it is small, because fresh pages cost more than the kernel.
class Arena {
 public:
  ~Arena() { std::free(block_); }
  void reserve(int64_t vectors) {
    used_ = 0;
    int64_t bytes = (vectors * int64_t(sizeof(V)) + 4095) / 4096 * 4096;
    if (bytes > size_ || size_ > KEEP) {
      std::free(block_);
      size_ = 0;
      block_ = std::aligned_alloc(4096, size_t(std::max<int64_t>(bytes, 4096)));
      if (!block_) throw std::bad_alloc();
      size_ = bytes;
    }
#ifdef SASA_SANITIZE
    std::memset(block_, 0xff, size_t(bytes));
#endif
  }
  V* take(int64_t vectors) {
    V* out = static_cast<V*>(block_) + used_;
    used_ += vectors;
    return out;
  }
  void release_large() {
    if (size_ > KEEP) {
      std::free(block_);
      block_ = nullptr;
      size_ = 0;
    }
  }

 private:
  static constexpr int64_t KEEP = int64_t(4) << 20;
  void* block_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline Arena& arena() {
  static thread_local Arena a;
  return a;
}

// Rows projected at once: enough pixels for an efficient product, few enough to stay in cache.
inline int64_t projected_rows(const Problem& p) { return std::max<int64_t>(ROWS, (448 + p.width - 1) / p.width); }

// Keys and values slide through a ring of so many rows, unless they are interleaved in memory already.
inline int64_t ring_rows(const Problem& p) {
  if (p.k.pixel && p.k.data) return 0;
  return std::min<int64_t>(p.height, p.kernel + ROWS - 1 + (p.project ? projected_rows(p) : 0));
}
// Vectors from key to key: in memory, in a ring of projected rows (queries, keys and values side by side), in a ring of keys.
inline int64_t key_stride(const Problem& p) {
  if (p.k.pixel && p.k.data) return p.k.pixel / LANES;
  return (p.project ? 3 : 1) * p.channels;
}
inline int64_t logit_keys(const Problem& p) {
  return std::max<int64_t>(CHUNK, std::min<int64_t>(p.kernel, p.width));
}

// What one task shares between its blocks.
struct Task {
  const Problem& p;
  int64_t first;  // plane in lane 0
  int64_t d, dr, dc, W, H, K, r;
  int64_t ks;  // vectors from key to key
  V *rel_row = nullptr, *rel_col = nullptr;  // [K][dr], [K][dc]
  V *row_logit, *col_logit;                  // [ROWS][K]: of the block at hand

  Task(const Problem& p_, int64_t group)
      : p(p_), first(group * LANES), d(p_.channels), dr(p_.channels / 2), dc(p_.channels - p_.channels / 2),
        W(p_.width), H(p_.height), K(p_.kernel), r(p_.kernel / 2), ks(key_stride(p_)) {}

  // Rows of keys, values or a gradient of them: those of an interleaved tensor, or else a ring.
  Rows rows(const Planes& t, Arena& a) const {
    if (t.pixel) return {interleaved(t, p, first), H, W * ks};
    const int64_t slots = ring_rows(p);
    return {a.take(slots * W * d), slots, W * d};
  }

  // Rows of interleaved queries, keys and values side by side, as a projection writes them.
  Rows projected(Arena& a) const {
    if (p.q.data) return {interleaved(p.q, p, first), H, W * ks};
    const int64_t slots = ring_rows(p);
    return {a.take(slots * W * ks), slots, W * ks};
  }

  static int64_t vectors(const Problem& p) { return p.kernel * p.channels + 2 * ROWS * p.kernel; }

  void setup(Arena& a) {
    rel_row = a.take(K * dr);
    rel_col = a.take(K * dc);
    row_logit = a.take(ROWS * K);
    col_logit = a.take(ROWS * K);
    if (!p.relative) {
      std::memset(static_cast<void*>(row_logit), 0, size_t(2 * ROWS * K) * sizeof(V));
      return;
    }
    for (int l = 0; l < LANES; ++l) {
      int64_t head = std::min(first + l, p.planes - 1) % p.heads;
      auto fill = [&](const void* src, V* out, int64_t n) {
        for (int64_t c = 0; c < n; ++c)
          for (int64_t o = 0; o < K; ++o) {
            int64_t at = (head * n + c) * K + o;
            out[o * n + c][l] = p.scalar == Scalar::bfloat16 ? widen(static_cast<const uint16_t*>(src)[at])
                                                             : static_cast<const float*>(src)[at];
          }
      };
      fill(p.rel_row, rel_row, dr);
      fill(p.rel_col, rel_col, dc);
    }
  }

  // Queries of nq rows from y0 on, times log2(e) -> out[query][channel].
  void load_queries(int64_t y0, int nq, V* out) const {
    if (p.q.pixel)
      copy_pixels(interleaved(p.q, p, first) + y0 * W * ks, ks, out, d, nq * W, d, LOG2E);
    else
      interleave(p.q, p, first, d, y0 * W, nq * W, out, LOG2E);
  }

  // Row and column logits of the nq queries at q.
  template <int D>
  void relative_logits(const V* const* q, int nq) const {
    if (!p.relative) return;
    with_count(nq, [&](auto na) {
      constexpr int NA = decltype(na)::value;
      auto half = [&](const V* rel, int64_t from, int64_t n, V* out) {
        const V* qc[NA];
        for (int i = 0; i < NA; ++i) qc[i] = q[i] + from;
        dot<D / 2, NA>(
            qc, rel, n, K, n, {},
            [&](int i, int64_t o, auto s) { store(out + i * K + o, s); });
      };
      if (dr) half(rel_row, 0, dr, row_logit);
      else std::memset(static_cast<void*>(row_logit), 0, size_t(NA * K) * sizeof(V));
      half(rel_col, dr, dc, col_logit);
    });
  }

  // f(row offset, column offset) for every offset of the window of query (y, x) that lies outside the image.
  template <class F>
  void outside(int64_t y, int64_t x, F f) const {
    for (int64_t a = 0; a < K; ++a) {
      bool row_inside = y + a - r >= 0 && y + a - r < H;
      for (int64_t b = 0; b < K; ++b)
        if (!row_inside || x + b - r < 0 || x + b - r >= W) f(a, b);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Forward

struct Forward {
  Rows qkv, k, v;  // qkv: where k and v are part of what a projection writes
  V* q;       // [ROWS][W][d]: queries times log2(e), replaced by the outputs
  V *top, *sum;  // [ROWS][W]: of the softmax
  V* logits;  // [ROWS][keys]
  V* out;     // [ROWS][d]
  int64_t keys;

  static int64_t vectors(const Problem& p) {
    int64_t row = p.width * p.channels;
    return Task::vectors(p) + (p.project ? 1 : 2) * ring_rows(p) * p.width * key_stride(p) +
           ROWS * (row + 2 * p.width + logit_keys(p) + p.channels);
  }
  void setup(const Task& t, Arena& a) {
    const Problem& p = t.p;
    const int64_t row = p.width * p.channels;
    if (p.project) {
      qkv = k = v = t.projected(a);
      k.base += p.channels;
      v.base += 2 * p.channels;
    } else {
      k = t.rows(p.k, a);
      v = t.rows(p.v, a);
    }
    keys = logit_keys(p);
    q = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    sum = a.take(ROWS * p.width);
    logits = a.take(ROWS * keys);
    out = a.take(ROWS * p.channels);
  }
};

template <int D>
void forward_pixel(const Task& t, const Forward& f, int64_t y0, int nq, int64_t x) {
  const int64_t d = D ? D : t.d, r = t.r, K = t.K;
  V* q[ROWS];
  for (int i = 0; i < nq; ++i) q[i] = f.q + (i * t.W + x) * d;
  t.relative_logits<D>(q, nq);

  V m[ROWS], sum[ROWS];
  bool first = true;
  for (int i = 0; i < nq; ++i) {
    m[i] = splat(-std::numeric_limits<float>::infinity());
    sum[i] = V{};
  }
  if (t.p.zero_border) {
    for (int i = 0; i < nq; ++i) {
      bool any = false;
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        m[i] = vmax(t.row_logit[i * K + a] + t.col_logit[i * K + b], m[i]);
        any = true;
      });
      // Row by row: one chain of K * K additions would lose digits.
      V part = V{};
      int64_t row = 0;
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        if (a != row) {
          sum[i] += part;
          part = V{};
          row = a;
        }
        part += exp2v(t.row_logit[i * K + a] + t.col_logit[i * K + b] - m[i]);
      });
      sum[i] += part;
      if (any) first = false;
    }
    if (!first)
      std::memset(static_cast<void*>(f.out), 0, size_t(nq * d) * sizeof(V));
  }

  const int64_t xa = std::max<int64_t>(0, x - r), xb = std::min(t.W, x + r + 1), n = xb - xa;
  const int64_t ka = std::max<int64_t>(0, y0 - r), kb = std::min(t.H, y0 + nq + r);
  const int64_t step = std::max<int64_t>(1, f.keys / n);
  const V* column = t.col_logit + (xa - x + r);

  for (int64_t ca = ka; ca < kb; ca += step) {
    const int64_t cb = std::min(kb, ca + step);
    V* w[ROWS];
    V m_old[ROWS];
    for (int i = 0; i < nq; ++i) {
      w[i] = f.logits + i * f.keys;
      m_old[i] = m[i];
    }
    for (int64_t ky = ca; ky < cb; ++ky) {
      const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
      const V* b = f.k(ky) + xa * t.ks;
      with_count(hi - lo, [&](auto na) SASA_ALWAYS_INLINE {
        constexpr int NA = decltype(na)::value;
        V row[NA];
        Wide top[NA];
        const V* cl[NA];
        V* wp[NA];
        const V* qp[NA];
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
          row[i] = t.row_logit[(lo + i) * K + ky - (y0 + lo + i) + r];
          cl[i] = column + (lo + i) * K;
          top[i] = spread<Wide>(m[lo + i]);
          wp[i] = w[lo + i] + (ky - ca) * n;
          qp[i] = q[lo + i];
        });
        dot<D, NA>(
            qp, b, t.ks, n, d, row,
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              s += load<T>(cl[i] + j);
              store(wp[i] + j, s);
              raise(top[i], s);
            });
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE { m[lo + i] = largest_of(top[i]); });
      });
    }
    for (int i = 0; i < nq; ++i) {
      const int64_t ya = std::max(ca, y0 + i - r), yb = std::min(cb, y0 + i + r + 1);
      Wide total = {};
      const V top = m[i];
      auto exponential = [&]<class T>(T, int64_t j) SASA_ALWAYS_INLINE {
        T e = exp2v(load<T>(w[i] + j) - spread<T>(top));
        store(w[i] + j, e);
        add(total, e);
      };
      int64_t j = (ya - ca) * n;
      const int64_t end = (yb - ca) * n;  // before j where no key of these rows is in the window
      if (j % WIDTH && j < end) exponential(V{}, j++);  // no access across cache lines
      for (; j + WIDTH <= end; j += WIDTH) exponential(Wide{}, j);
      for (; j < end; ++j) exponential(V{}, j);
      if (first) {
        sum[i] = sum_of(total);
      } else {
        V fade = exp2v(m_old[i] - top);
        sum[i] = sum[i] * fade + sum_of(total);
        for (int64_t c = 0; c < d; ++c) f.out[i * d + c] *= fade;
      }
    }
    auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
      T acc[ROWS][N];
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
          acc[i][c] = (first || i >= nq) ? T{} : load<T>(f.out + i * d + c0 + c * PARTS<T>);
        });
      });
      for (int64_t ky = ca; ky < cb; ++ky) {
        const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
        weighted(acc, lo, hi, w, (ky - ca) * n, f.v(ky) + xa * t.ks + c0, t.ks, n);
      }
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(f.out + i * d + c0 + c * PARTS<T>, acc[i][c]); });
      });
    };
    by_channels<D>(d, columns);
    first = false;
  }
  for (int i = 0; i < nq; ++i) {
    V scale = 1.0f / sum[i];
    for (int64_t c = 0; c < d; ++c) q[i][c] = f.out[i * d + c] * scale;
    f.top[i * t.W + x] = m[i];
    f.sum[i * t.W + x] = sum[i];
  }
}

template <int D>
void forward_rows(const Problem& p, int64_t group, int64_t from, int64_t to) {
  Arena& a = arena();
  a.reserve(Forward::vectors(p));
  Task t(p, group);
  t.setup(a);
  Forward f;
  f.setup(t, a);
  int64_t loaded = std::max<int64_t>(0, from - t.r);
  for (int64_t y0 = from; y0 < to; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, to - y0));
    const int64_t need = std::min(t.H, y0 + nq + t.r);
    if (p.project && need > loaded) {
      const int64_t until = std::min(t.H, std::max(need, loaded + projected_rows(p)));
      f.qkv.runs(loaded, until, [&](int64_t y, int64_t count, V* out) {
        p.project(p.context, group, y, y + count, reinterpret_cast<float*>(out), t.ks * LANES);
      });
      loaded = until;
    } else if (!p.k.pixel) {
      f.k.runs(loaded, need, [&](int64_t y, int64_t count, V* out) {
        interleave(p.k, p, t.first, t.d, y * t.W, count * t.W, out);
      });
      f.v.runs(loaded, need, [&](int64_t y, int64_t count, V* out) {
        interleave(p.v, p, t.first, t.d, y * t.W, count * t.W, out);
      });
      loaded = std::max(loaded, need);
    }
    if (p.project)
      f.qkv.runs(y0, y0 + nq, [&](int64_t y, int64_t count, V* from) {
        copy_pixels(from, t.ks, f.q + (y - y0) * t.W * t.d, t.d, count * t.W, t.d, LOG2E);
      });
    else
      t.load_queries(y0, nq, f.q);
    for (int64_t x = 0; x < t.W; ++x) forward_pixel<D>(t, f, y0, nq, x);
    separate(p.y, p, t.first, t.d, y0 * t.W, nq * t.W, f.q);
    if (p.top.data) {
      separate(p.top, p, t.first, 1, y0 * t.W, nq * t.W, f.top);
      separate(p.sum, p, t.first, 1, y0 * t.W, nq * t.W, f.sum);
    }
  }
  a.release_large();
}

// ---------------------------------------------------------------------------------------------------------------
// Backward

struct Backward {
  Rows k, v, dk, dv;
  V* q;      // [ROWS][W][d]: queries times log2(e), replaced by their gradients
  V* dy;     // [ROWS][W][d], over the sum of the softmax, so that P need not be divided by it
  V* top;    // [ROWS][W]
  V* delta;  // [ROWS][W]: dy.y, first the sum of the softmax
  V *P, *dS; // [ROWS][keys]
  V* dq;     // [ROWS][d]
  V *row_sum, *col_sum;  // [ROWS][K]: dS summed over the row, the column
  V *drel_row, *drel_col;
  int64_t keys;

  static int64_t vectors(const Problem& p) {
    int64_t row = p.width * p.channels;
    return Task::vectors(p) + 4 * ring_rows(p) * row + 2 * ROWS * (row + p.width + logit_keys(p) + p.kernel) +
           ROWS * p.channels;
  }
  void setup(const Task& t, Arena& a) {
    const Problem& p = t.p;
    const int64_t row = p.width * p.channels;
    k = t.rows(p.k, a);
    v = t.rows(p.v, a);
    dk = t.rows(p.dk, a);
    dv = t.rows(p.dv, a);
    keys = logit_keys(p);
    q = a.take(ROWS * row);
    dy = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    delta = a.take(ROWS * p.width);
    P = a.take(ROWS * keys);
    dS = a.take(ROWS * keys);
    row_sum = a.take(ROWS * p.kernel);
    col_sum = a.take(ROWS * p.kernel);
    dq = a.take(ROWS * p.channels);
  }
};

// Queries (y0 + i, x), i < nq, against key rows [ka, kb). `own`: the queries are this task's, so their gradient and
// that of the relative embedding are its to compute; dk and dv are, for the key rows in [from, to).
template <int D>
void backward_pixel(const Task& t, const Backward& f, int64_t y0, int nq, int64_t x, int64_t ka, int64_t kb, bool own,
                    int64_t from, int64_t to) {
  const int64_t d = D ? D : t.d, r = t.r, K = t.K;
  V* q[ROWS];
  const V* dy[ROWS];
  for (int i = 0; i < nq; ++i) {
    q[i] = f.q + (i * t.W + x) * d;
    dy[i] = f.dy + (i * t.W + x) * d;
  }
  t.relative_logits<D>(q, nq);
  if (own) {
    std::memset(static_cast<void*>(f.row_sum), 0, size_t(nq * K) * sizeof(V));
    std::memset(static_cast<void*>(f.col_sum), 0, size_t(nq * K) * sizeof(V));
    std::memset(static_cast<void*>(f.dq), 0, size_t(nq * d) * sizeof(V));
    if (t.p.zero_border && t.p.relative)
      for (int i = 0; i < nq; ++i) {
        const V top = f.top[i * t.W + x], delta = f.delta[i * t.W + x];
        t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
          V dS = -delta * exp2v(t.row_logit[i * K + a] + t.col_logit[i * K + b] - top);
          f.row_sum[i * K + a] += dS;
          f.col_sum[i * K + b] += dS;
        });
      }
  }
  const int64_t xa = std::max<int64_t>(0, x - r), xb = std::min(t.W, x + r + 1), n = xb - xa;
  const int64_t step = std::max<int64_t>(1, f.keys / n), b0 = xa - x + r;

  for (int64_t ca = ka; ca < kb; ca += step) {
    const int64_t cb = std::min(kb, ca + step);
    V *P[ROWS], *dS[ROWS];
    for (int i = 0; i < nq; ++i) {
      P[i] = f.P + i * f.keys;
      dS[i] = f.dS + i * f.keys;
    }
    for (int64_t ky = ca; ky < cb; ++ky) {
      const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
      if (lo >= hi) continue;
      const int64_t at = (ky - ca) * n;
      const bool scatter = ky >= from && ky < to;
      with_count(hi - lo, [&](auto na) SASA_ALWAYS_INLINE {
        constexpr int NA = decltype(na)::value;
        V row[NA], top[NA], delta[NA];
        Wide total[NA];
        const V *cl[NA], *qp[NA], *gp[NA];
        V *Pp[NA], *Sp[NA], *cs[NA];
        unroll<NA>([&](auto i_) SASA_ALWAYS_INLINE {
          const int i = lo + i_;
          row[i_] = t.row_logit[i * K + ky - (y0 + i) + r];
          top[i_] = f.top[i * t.W + x];
          cl[i_] = t.col_logit + i * K + b0;
          delta[i_] = f.delta[i * t.W + x];
          total[i_] = Wide{};
          qp[i_] = q[i];
          gp[i_] = dy[i];
          Pp[i_] = P[i] + at;
          Sp[i_] = dS[i] + at;
          cs[i_] = f.col_sum + i * K + b0;
        });
        dot<D, NA>(
            qp, f.k(ky) + xa * t.ks, t.ks, n, d, row,
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              store(Pp[i] + j, exp2v(s + load<T>(cl[i] + j) - spread<T>(top[i])));
            });
        dot<D, NA>(
            gp, f.v(ky) + xa * t.ks, t.ks, n, d, {},
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              s = (s - spread<T>(delta[i])) * load<T>(Pp[i] + j);
              store(Sp[i] + j, s);
              add(total[i], s);
              store(cs[i] + j, load<T>(cs[i] + j) + s);
            });
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
          f.row_sum[(lo + i) * K + ky - (y0 + lo + i) + r] += sum_of(total[i]);
        });
        if (scatter) {
          outer<D, NA>(Sp, qp, f.dk(ky) + xa * t.ks, t.ks, n, d);
          outer<D, NA>(Pp, gp, f.dv(ky) + xa * t.ks, t.ks, n, d);
        }
      });
    }
    if (!own) continue;
    auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
      T acc[ROWS][N];
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
          acc[i][c] = i >= nq ? T{} : load<T>(f.dq + i * d + c0 + c * PARTS<T>);
        });
      });
      for (int64_t ky = ca; ky < cb; ++ky) {
        const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
        weighted(acc, lo, hi, dS, (ky - ca) * n, f.k(ky) + xa * t.ks + c0, t.ks, n);
      }
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(f.dq + i * d + c0 + c * PARTS<T>, acc[i][c]); });
      });
    };
    by_channels<D>(d, columns);
  }
  if (!own) return;
  if (t.p.relative) {
    V *rs[ROWS], *cs[ROWS];
    const V* qc[ROWS];
    for (int i = 0; i < nq; ++i) {
      rs[i] = f.row_sum + i * K;
      cs[i] = f.col_sum + i * K;
      qc[i] = q[i] + t.dr;
    }
    with_count(nq, [&](auto na) {
      constexpr int NA = decltype(na)::value;
      outer<D / 2, NA>(rs, q, f.drel_row, t.dr, K, t.dr);
      outer<D / 2, NA>(cs, qc, f.drel_col, t.dc, K, t.dc);
    });
    auto columns = [&]<class T, int N>(Piece<T, N>, V* const* w, const V* rel, int64_t n, int64_t c0,
                                       V* out) SASA_ALWAYS_INLINE {
      T acc[ROWS][N] = {};
      weighted(acc, 0, nq, w, 0, rel + c0, n, K);
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
            V* sum = out + i * d + c0 + c * PARTS<T>;
            store(sum, load<T>(sum) + acc[i][c]);
          });
      });
    };
    auto half = [&](V* const* w, const V* rel, int64_t n, V* out) {
      by_channels<D / 2>(n, [&](auto piece, int64_t c) SASA_ALWAYS_INLINE { columns(piece, w, rel, n, c, out); });
    };
    half(rs, t.rel_row, t.dr, f.dq);
    half(cs, t.rel_col, t.dc, f.dq + t.dr);
  }
  for (int i = 0; i < nq; ++i)
    for (int64_t c = 0; c < d; ++c) q[i][c] = f.dq[i * d + c];
}

template <int D>
void backward_rows(const Problem& p, int64_t group, int64_t from, int64_t to) {
  Arena& a = arena();
  a.reserve(Backward::vectors(p));
  Task t(p, group);
  t.setup(a);
  Backward f;
  f.setup(t, a);
  const int64_t d = t.d, W = t.W;
  const int64_t begin = std::max<int64_t>(0, from - t.r) / ROWS * ROWS, end = std::min(t.H, to + t.r);
  int64_t loaded = std::max<int64_t>(0, from - t.r), flushed = from;
  for (int64_t y0 = begin; y0 < end; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, t.H - y0));
    const bool own = y0 >= from && y0 < to;
    int64_t ka = std::max<int64_t>(0, y0 - t.r), kb = std::min(t.H, y0 + nq + t.r);
    if (!own) {
      ka = std::max(ka, from);
      kb = std::min(kb, to);
      if (ka >= kb) continue;
    }
    auto flush = [&](int64_t until) {
      if (p.dk.pixel) {
        if (until > flushed) copy_pixels(f.dk(flushed), t.ks, f.dk(flushed), t.ks, (until - flushed) * W, d, LN2);
        flushed = std::max(flushed, until);
        return;
      }
      f.dk.runs(flushed, until, [&](int64_t y, int64_t count, V* in) {
        separate(p.dk, p, t.first, d, y * W, count * W, in, LN2);
      });
      f.dv.runs(flushed, until, [&](int64_t y, int64_t count, V* in) {
        separate(p.dv, p, t.first, d, y * W, count * W, in);
      });
      flushed = std::max(flushed, until);
    };
    flush(std::min(ka, to));
    if (p.k.pixel) {
      for (int64_t y = std::max(loaded, from); y < std::min(kb, to); ++y)
        for (int64_t x = 0; x < W; ++x)
          for (V* g : {f.dk(y), f.dv(y)}) std::memset(static_cast<void*>(g + x * t.ks), 0, size_t(d) * sizeof(V));
    } else {
      f.k.runs(loaded, kb, [&](int64_t y, int64_t count, V* out) {
        interleave(p.k, p, t.first, d, y * W, count * W, out);
        std::memset(static_cast<void*>(f.dk(y)), 0, size_t(count * W * d) * sizeof(V));
      });
      f.v.runs(loaded, kb, [&](int64_t y, int64_t count, V* out) {
        interleave(p.v, p, t.first, d, y * W, count * W, out);
        std::memset(static_cast<void*>(f.dv(y)), 0, size_t(count * W * d) * sizeof(V));
      });
    }
    loaded = std::max(loaded, kb);

    interleave(p.y, p, t.first, d, y0 * W, nq * W, f.q);
    interleave(p.dy, p, t.first, d, y0 * W, nq * W, f.dy);
    interleave(p.top, p, t.first, 1, y0 * W, nq * W, f.top);
    interleave(p.sum, p, t.first, 1, y0 * W, nq * W, f.delta);
    for (int64_t i = 0; i < nq * W; ++i) {
      const V over_sum = 1.0f / f.delta[i], *y = f.q + i * d;
      for (int64_t c = 0; c < d; ++c) f.dy[i * d + c] *= over_sum;
      // Added in the order of dy.v, from which it is exactly nothing where a window has one key.
      dot<D, 1>(&y, f.dy + i * d, d, 1, d, {}, [&](auto, int64_t, auto dy_y) { store(f.delta + i, dy_y); });
    }
    t.load_queries(y0, nq, f.q);
    if (own && p.relative) {
      V* part = static_cast<V*>(p.drel_parts) + (group * ((t.H + ROWS - 1) / ROWS) + y0 / ROWS) * t.K * d;
      std::memset(static_cast<void*>(part), 0, size_t(t.K * d) * sizeof(V));
      f.drel_row = part;
      f.drel_col = part + t.K * t.dr;
    }
    for (int64_t x = 0; x < W; ++x) backward_pixel<D>(t, f, y0, nq, x, ka, kb, own, from, to);
    if (own && p.dq.pixel)
      copy_pixels(f.q, d, interleaved(p.dq, p, t.first) + y0 * W * t.ks, t.ks, nq * W, d);
    else if (own)
      separate(p.dq, p, t.first, d, y0 * W, nq * W, f.q);
    if (y0 + ROWS >= end) flush(to);
  }
  a.release_large();
}

// Sums the relative embedding's partial gradients of one head over blocks, groups and lanes, in that fixed order.
inline void reduce_relative(const Problem& p, int64_t head) {
  const int64_t d = p.channels, dr = d / 2, K = p.kernel, blocks = (p.height + ROWS - 1) / ROWS;
  const V* parts = static_cast<const V*>(p.drel_parts);
  for (int64_t e = 0; e < K * d; ++e) {
    float sum = 0;
    for (int64_t plane = head; plane < p.planes; plane += p.heads)
      for (int64_t b = 0; b < blocks; ++b) sum += parts[((plane / LANES) * blocks + b) * K * d + e][plane % LANES];
    sum *= LN2;
    const bool row = e < K * dr;
    const int64_t n = row ? dr : d - dr, at = row ? e : e - K * dr;
    const int64_t to = (head * n + at % n) * K + at / n;
    void* out = row ? p.drel_row : p.drel_col;
    if (p.scalar == Scalar::bfloat16)
      static_cast<uint16_t*>(out)[to] = narrow<uint16_t>(sum);
    else
      static_cast<float*>(out)[to] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------

template <class F>
inline void with_width(int64_t d, F&& f) {
  switch (d) {
#if !defined(SASA_SANITIZE) || defined(SASA_WIDE)
    case 8: return f(std::integral_constant<int, 8>{});
#endif
#ifndef SASA_SANITIZE
    case 16: return f(std::integral_constant<int, 16>{});
    case 32: return f(std::integral_constant<int, 32>{});
    case 64: return f(std::integral_constant<int, 64>{});
#endif
    default: return f(std::integral_constant<int, 0>{});
  }
}

inline void forward(const Problem& p, int64_t group, int64_t from, int64_t to) {
  with_width(p.channels, [&](auto d) { forward_rows<decltype(d)::value>(p, group, from, to); });
}

inline void backward(const Problem& p, int64_t group, int64_t from, int64_t to) {
  with_width(p.channels, [&](auto d) { backward_rows<decltype(d)::value>(p, group, from, to); });
}

}  // namespace SASA_ISA
