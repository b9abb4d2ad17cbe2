// What the two directions of the attention stem share: vectors, the problem, its packed parameters, a block's softmax.
// stem.cpp says what is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define STEM_CALLED __attribute__((always_inline))
#define STEM_INLINE inline STEM_CALLED
#define UNROLL _Pragma("GCC unroll 16")
// The outer loop of a product: unrolled where 16 vectors stay in registers.
#ifdef __AVX512F__
#define OUTER UNROLL
#else
#define OUTER _Pragma("GCC unroll 1")
#endif

namespace stem {

constexpr int SIDE = 4, PIXELS = 16, COLOURS = 3, OFFSETS = 2 * SIDE - 1, FORM = COLOURS + 2 * OFFSETS;
// Of the spatial convolution for values: numbers of a filter, pixels of an image that a block's values come from.
constexpr int TAPS = COLOURS * PIXELS, REACH = 2 * SIDE - 1, BEFORE = (SIDE - 1) / 2;
static_assert(TAPS == PIXELS * COLOURS);  // so many vectors hold the value weights of 16 channels, of either kind

// How many sums of a product stay in registers.
#ifdef __AVX512F__
constexpr int TOGETHER = 16;
#else
constexpr int TOGETHER = 4;
#endif

typedef float V __attribute__((vector_size(4 * PIXELS), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * PIXELS), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(PIXELS)));

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

STEM_INLINE V splat(float x) { return x - V{}; }

// The larger of the two; b where either is NaN.
STEM_INLINE V vmax(V a, V b) {
#ifdef __AVX512F__
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0, at least 2^-126; a relative error of 2e-7. NaN stays NaN.
STEM_INLINE V exp2_of(V x) {
  constexpr float ROUND = 12582912.0f + 127.0f;  // adds what is 127 + the nearest integer in the low bits
  x = vmax(splat(-126.0f), x);
  const V t = x + ROUND, f = x - (t - ROUND);
  V p = f * 1.32647268e-3f + 9.67151267e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return p * (V)((VI)t << 23);
}

// What both sides of ctypes agree on; sasa_bench/impls/_stem.py has the same fields. Strides are in elements.
struct Problem {
  int64_t batch, height, width, heads, channels;  // channels: of one head
  int64_t threads;
  const float* x;  // [batch, 3, height, width]
  int64_t x_image, x_colour, x_row, x_pixel;
  const float* form;     // [heads, 3, 3 + 7 + 7]: A, U and W
  const float* places;   // G: [16, heads * channels, 3], or null:
  const float* filters;  // of a 4 x 4 convolution that makes v, [heads * channels, 3, 4, 4]
  const float* shift;    // [heads * channels], or null: what is added before max(., 0)
  float* top;            // [batch, blocks down, blocks across, heads * channels] by these strides
  int64_t top_image, top_channel, top_row, top_block;
  uint8_t* argmax;    // [batch, blocks down, blocks across, heads * channels], or null
  const float* base;  // with `sums`: [heads * channels], about the mean of y
  double* sums;       // null, or [threads, 2, heads * channels]: of y - base and of its square
  // Backward.
  const float *gradient, *offset, *slope;  // g [batch, blocks down, blocks across, C]; [C] or both null
  float* dx;                               // null, or contiguous [batch, 3, height, width]; zeros with `filters`
  double *dform, *dvalues;                 // [threads, heads, 3, 17]; [threads, the shape of places or filters]

  int64_t down() const { return (height + SIDE - 1) / SIDE; }    // blocks
  int64_t across() const { return (width + SIDE - 1) / SIDE; }
  int64_t all_channels() const { return heads * channels; }
};

// Zeros that live as long as this, aligned for vectors.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory(bytes + sizeof(V), 0) {
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    next = memory.data() + (at + sizeof(V) - 1) / sizeof(V) * sizeof(V) - at;
  }
  template <class T>
  T* take(int64_t count) {
    static_assert(sizeof(T) % sizeof(V) == 0);
    auto* taken = reinterpret_cast<T*>(next);
    next += count * sizeof(T);
    return taken;
  }

 private:
  std::vector<char> memory;
  char* next;
};

// The form of one head in base 2, by query lanes.
struct Form {
  V row[COLOURS][SIDE], column[COLOURS][SIDE];
  float a[COLOURS][COLOURS];
};

// Parameters by group: 16 channels of one head, the last ones filled up with zeros.
class Packed {
  Arena arena;

 public:
  int64_t vectors, groups;  // groups in a head, and in all
  Form* forms;
  // Value weights. By place: [group, 16 places, 3] of 16 channels and [group, 16 channels, 3] of 16 places. Filters:
  // [group, TAPS] of 16 channels.
  V *by_place, *by_channel, *taps;
  V *shift, *base, *offset, *slope;  // [group]

  explicit Packed(const Problem& p)
      : arena(p.heads * int64_t(sizeof(Form)) +
              (3 * TAPS + 4) * p.heads * ((p.channels + PIXELS - 1) / PIXELS) * int64_t(sizeof(V))),
        vectors((p.channels + PIXELS - 1) / PIXELS), groups(p.heads * vectors), forms(arena.take<Form>(p.heads)) {
    for (V** each : {&by_place, &by_channel, &taps}) *each = arena.take<V>(groups * TAPS);
    for (V** each : {&shift, &base, &offset, &slope}) *each = arena.take<V>(groups);
    for (int64_t h = 0; h < p.heads; ++h) pack_form(p.form + h * COLOURS * FORM, forms[h]);
    for (int64_t channel = 0; channel < p.all_channels(); ++channel) pack_channel(p, channel);
  }

 private:
  void pack_channel(const Problem& p, int64_t channel) {
    const int64_t in_head = channel % p.channels, lane = in_head % PIXELS;
    const int64_t group = channel / p.channels * vectors + in_head / PIXELS;
    if (p.shift) shift[group][lane] = p.shift[channel];
    if (p.base) base[group][lane] = p.base[channel];
    if (p.offset) offset[group][lane] = p.offset[channel], slope[group][lane] = p.slope[channel];
    if (p.filters) {
      for (int64_t t = 0; t < TAPS; ++t) taps[group * TAPS + t][lane] = p.filters[channel * TAPS + t];
      return;
    }
    for (int64_t j = 0; j < PIXELS; ++j)
      for (int64_t k = 0; k < COLOURS; ++k) {
        const float g = p.places[(j * p.all_channels() + channel) * COLOURS + k];
        by_place[(group * PIXELS + j) * COLOURS + k][lane] = g;
        by_channel[(group * PIXELS + lane) * COLOURS + k][j] = g;
      }
  }

  static void pack_form(const float* form, Form& to) {
    for (int k = 0; k < COLOURS; ++k) {
      const float *a = form + k * FORM, *u = a + COLOURS, *w = u + OFFSETS;
      for (int l = 0; l < COLOURS; ++l) to.a[k][l] = a[l] * LOG2E;
      for (int s = 0; s < SIDE; ++s)
        for (int i = 0; i < PIXELS; ++i) {
          to.row[k][s][i] = u[s - i / SIDE + SIDE - 1] * LOG2E;
          to.column[k][s][i] = w[s - i % SIDE + SIDE - 1] * LOG2E;
        }
    }
  }
};

// Sixteen channels of a head.
struct Group {
  int64_t index, first, count;  // among all groups; its first channel among all; how many there are

  Group(const Problem& p, const Packed& packed, int64_t head, int64_t part)
      : index(head * packed.vectors + part), first(head * p.channels + part * PIXELS),
        count(std::min<int64_t>(PIXELS, p.channels - part * PIXELS)) {}
};

// One block of an image: which pixels lie inside, and their colours, 0 elsewhere.
struct Block {
  int64_t image, top, left, rows, columns;
  V x[COLOURS];

  Block(const Problem& p, int64_t image, int64_t down, int64_t across)
      : image(image), top(down * SIDE), left(across * SIDE), rows(std::min<int64_t>(SIDE, p.height - top)),
        columns(std::min<int64_t>(SIDE, p.width - left)) {
    const float* from = p.x + image * p.x_image + top * p.x_row + left * p.x_pixel;
    alignas(64) float colour[PIXELS];
    for (int k = 0; k < COLOURS; ++k) {
      if (whole()) {
        UNROLL for (int i = 0; i < PIXELS; ++i)
          colour[i] = from[k * p.x_colour + i / SIDE * p.x_row + i % SIDE * p.x_pixel];
      } else {
        for (int i = 0; i < PIXELS; ++i)
          colour[i] = inside(i) ? from[k * p.x_colour + i / SIDE * p.x_row + i % SIDE * p.x_pixel] : 0.0f;
      }
      std::memcpy(&x[k], colour, sizeof colour);
    }
  }

  bool whole() const { return rows == SIDE && columns == SIDE; }
  bool inside(int i) const { return i / SIDE < rows && i % SIDE < columns; }
};

// The colours that the values of a block come from where they are a convolution: its pixels and those around, 0 outside.
struct Patch {
  alignas(64) float x[COLOURS][REACH][REACH + 1] = {};

  void load(const Problem& p, const Block& b) {
    const int64_t row = std::max<int64_t>(0, BEFORE - b.top), column = std::max<int64_t>(0, BEFORE - b.left);
    const int64_t row_end = std::min<int64_t>(REACH, p.height + BEFORE - b.top);
    const int64_t column_end = std::min<int64_t>(REACH, p.width + BEFORE - b.left);
    if (row || column || row_end < REACH || column_end < REACH) std::memset(x, 0, sizeof x);
    const float* from = p.x + b.image * p.x_image + (b.top - BEFORE) * p.x_row + (b.left - BEFORE) * p.x_pixel;
    for (int k = 0; k < COLOURS; ++k)
      for (int64_t r = row; r < row_end; ++r)
        for (int64_t c = column; c < column_end; ++c)
          x[k][r][c] = from[k * p.x_colour + r * p.x_row + c * p.x_pixel];
  }
};

// weights[j][i] = P_ij, and t[k][j] = (A x_j)_k in base 2.
STEM_INLINE void attend(const Form& form, const Block& b, V* weights, float (*t)[PIXELS]) {
  V row[SIDE], column[SIDE];
  UNROLL for (int s = 0; s < SIDE; ++s) {
    row[s] = b.x[0] * form.row[0][s] + b.x[1] * form.row[1][s] + b.x[2] * form.row[2][s];
    column[s] = b.x[0] * form.column[0][s] + b.x[1] * form.column[1][s] + b.x[2] * form.column[2][s];
  }
  for (int k = 0; k < COLOURS; ++k) {
    const V along = b.x[0] * form.a[k][0] + b.x[1] * form.a[k][1] + b.x[2] * form.a[k][2];
    std::memcpy(t[k], &along, sizeof along);
  }
  V logit[PIXELS];
  UNROLL for (int j = 0; j < PIXELS; ++j) {
    logit[j] = row[j / SIDE] + column[j % SIDE];
    logit[j] += b.x[0] * t[0][j];
    logit[j] += b.x[1] * t[1][j];
    logit[j] += b.x[2] * t[2][j];
  }
  if (!b.whole())
    for (int j = 0; j < PIXELS; ++j)
      if (!b.inside(j)) logit[j] = splat(-__builtin_inff());
  V top = logit[0];
  UNROLL for (int j = 1; j < PIXELS; ++j) top = vmax(logit[j], top);
  UNROLL for (int j = 0; j < PIXELS; ++j) logit[j] = exp2_of(logit[j] - top);
  if (!b.whole())
    for (int j = 0; j < PIXELS; ++j)
      if (!b.inside(j)) logit[j] = V{};
  V sum = logit[0];
  UNROLL for (int j = 1; j < PIXELS; ++j) sum += logit[j];
  const V share = 1.0f / sum;
  UNROLL for (int j = 0; j < PIXELS; ++j) weights[j] = logit[j] * share;
}

#if defined(__AVX512F__) && !defined(__clang__)
template <int STEP>
STEM_INLINE void exchange(V* m) {
  VI low, high;
  UNROLL for (int c = 0; c < PIXELS; ++c) {
    low[c] = c & STEP ? PIXELS + c - STEP : c;
    high[c] = c & STEP ? PIXELS + c : c + STEP;
  }
  UNROLL for (int i = 0; i < PIXELS; ++i) {
    if (i & STEP) continue;
    const V a = m[i], b = m[i + STEP];
    m[i] = __builtin_shuffle(a, b, low);
    m[i + STEP] = __builtin_shuffle(a, b, high);
  }
}

// The transpose of 16 vectors.
STEM_INLINE void transpose(V* m) {
  exchange<8>(m);
  exchange<4>(m);
  exchange<2>(m);
  exchange<1>(m);
}
#else
STEM_INLINE void transpose(V* m) {
  float* f = reinterpret_cast<float*>(m);
  for (int i = 0; i < PIXELS; ++i)
    for (int j = 0; j < i; ++j) std::swap(f[i * PIXELS + j], f[j * PIXELS + i]);
}
#endif

}  // namespace stem
