// Planes in memory, interleaved and back.
#pragma once

#include "vectors.h"

namespace SASA_ISA {

// float16 in memory; everything is computed in float32.
struct Half {
  uint16_t bits;
};
#if defined(__F16C__) && defined(__AVX2__)
#define SASA_F16C
#endif

template <class T>
struct Of {};
// work(Of<T>()) for the type of a tensor's elements: float, uint16_t for bfloat16, or Half.
template <class Work>
SASA_INLINE void with_type(Scalar scalar, Work&& work) {
  switch (scalar) {
    case Scalar::float32: return work(Of<float>());
    case Scalar::bfloat16: return work(Of<uint16_t>());
    case Scalar::float16: return work(Of<Half>());
  }
}

SASA_INLINE float widen(float x) { return x; }
SASA_INLINE float widen(Half x) {
#ifdef SASA_F16C
  return _cvtsh_ss(x.bits);
#else
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float out = float(fraction) * 0x1p-24f;  // below 2^-14
  if (exponent) {
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&out, &bits, 4);
  }
  return x.bits & 0x8000 ? -out : out;
#endif
}
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

template <>
SASA_INLINE Half narrow<Half>(float x) {  // to nearest even
#ifdef SASA_F16C
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520, halfway to the number after the largest one
  if (bits >= 0x38800000) return {uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
  // Below 2^-14 it is a multiple of 2^-24, which is the last place of 0.5.
  const float sum = std::abs(x) + 0.5f;
  std::memcpy(&bits, &sum, 4);
  return {uint16_t(sign | (bits - 0x3f000000))};
#endif
}

// Lanes of a and b in turns of h: those that a transposition by blocks of h x h puts into its first or second vector.
template <int h, bool second>
constexpr int transposed_lane(int l) {
  return second ? ((l & h) ? LANES + l : l + h) : ((l & h) ? LANES + l - h : l);
}

template <int h, bool second, int... l>
SASA_INLINE V take_turns(V a, V b, std::integer_sequence<int, l...>) {
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
        r[i] = take_turns<h, false>(a, b, all);
        r[i + h] = take_turns<h, true>(a, b, all);
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
  } else if constexpr (std::is_same_v<T, Half>) {
#ifdef SASA_F16C
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return (V)_mm256_cvtph_ps(h);
#else
    V out;
    for (int l = 0; l < LANES; ++l) out[l] = widen(p[l]);
    return out;
#endif
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
  } else if constexpr (std::is_same_v<T, Half>) {
#ifdef SASA_F16C
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &h, sizeof h);
#else
    for (int l = 0; l < LANES; ++l) p[l] = narrow<Half>(v[l]);
#endif
  } else {
    typedef uint16_t H __attribute__((vector_size(2 * LANES)));
    typedef uint32_t U __attribute__((vector_size(4 * LANES)));
    const U bits = (U)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const H h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, H);
    std::memcpy(p, &h, sizeof h);
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

// f(c, n) for pieces of n = LANES channels from c on, or of one where there are fewer than LANES. The last piece may
// overlap the one before it.
template <class F>
SASA_INLINE void by_channel_blocks(int64_t channels, F f) {
  if (channels < LANES) {
    for (int64_t c = 0; c < channels; ++c) f(c, std::integral_constant<int, 1>{});
    return;
  }
  for (int64_t c = 0;; c = std::min(c + LANES, channels - LANES)) {
    f(c, std::integral_constant<int, LANES>{});
    if (c + LANES >= channels) return;
  }
}

// As interleave_as, where the channels of a pixel lie side by side.
template <class T>
void interleave_pixels(const Planes& t, const Lanes<T>& lanes, int64_t channels, int64_t from, int64_t count, V* out,
                       float scale) {
  for (int64_t i = 0; i < count; ++i)
    by_channel_blocks(channels, [&](int64_t c, auto n) SASA_ALWAYS_INLINE {
      V r[LANES];
      const int64_t at = (from + i) * t.column + c;
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE {
        if constexpr (n == 1)
          r[0][int(l)] = widen(lanes.base[l][at]);
        else
          r[l] = load_pixels(lanes.base[l] + at);
      });
      if constexpr (n > 1) transpose(r);
      unroll<n>([&](auto l) SASA_ALWAYS_INLINE { out[i * channels + c + l] = r[l] * scale; });
    });
}

// The inverse of interleave_pixels.
template <class T>
void separate_pixels(const Planes& t, const Lanes<T>& lanes, int64_t channels, int64_t from, int64_t count, const V* in,
                     float scale) {
  for (int64_t i = 0; i < count; ++i)
    by_channel_blocks(channels, [&](int64_t c, auto n) SASA_ALWAYS_INLINE {
      V r[LANES];
      const int64_t at = (from + i) * t.column + c;
      unroll<n>([&](auto l) SASA_ALWAYS_INLINE { r[l] = in[i * channels + c + l] * scale; });
      if constexpr (n > 1) transpose(r);
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE {
        if (l >= lanes.count) return;
        if constexpr (n == 1)
          lanes.base[l][at] = narrow<T>(r[0][int(l)]);
        else
          store_pixels(lanes.base[l] + at, r[l]);
      });
    });
}

// Pixels [from, from + count) of `channels` channels of LANES planes -> out[pixel][channel], times scale.
template <class T>
void interleave_as(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from, int64_t count,
                   V* out, float scale) {
  Lanes<T> lanes(t, p, first, channels);
  if (t.column != 1) return interleave_pixels(t, lanes, channels, from, count, out, scale);
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
  if (t.column != 1) return separate_pixels(t, lanes, channels, from, count, in, scale);
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

// Where the group of planes from `first` on begins in an interleaved tensor, and the same in vectors of float32.
template <class T>
SASA_INLINE T* group_of(const Planes& t, const Problem& p, int64_t first) {
  return static_cast<T*>(t.data) + (first / p.heads) * t.image + (first % p.heads) / LANES * t.group;
}
SASA_INLINE V* interleaved(const Planes& t, const Problem& p, int64_t first) {
  return reinterpret_cast<V*>(group_of<float>(t, p, first));
}

inline void interleave(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from,
                       int64_t count, V* out, float scale = 1.0f) {
  with_type(t.scalar, [&]<class T>(Of<T>) {
    if (!t.pixel) return interleave_as<T>(t, p, first, channels, from, count, out, scale);
    const T* in = group_of<T>(t, p, first) + from * t.pixel;
    for (int64_t i = 0; i < count; ++i, in += t.pixel)
      for (int64_t c = 0; c < channels; ++c) *out++ = load_pixels(in + c * LANES) * scale;
  });
}

inline void separate(const Planes& t, const Problem& p, int64_t first, int64_t channels, int64_t from, int64_t count,
                     const V* in, float scale = 1.0f) {
  with_type(t.scalar, [&]<class T>(Of<T>) {
    if (!t.pixel) return separate_as<T>(t, p, first, channels, from, count, in, scale);
    T* out = group_of<T>(t, p, first) + from * t.pixel;
    for (int64_t i = 0; i < count; ++i, out += t.pixel)
      for (int64_t c = 0; c < channels; ++c) store_pixels(out + c * LANES, *in++ * scale);
  });
}

}  // namespace SASA_ISA
