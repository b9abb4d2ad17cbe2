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
// on the pixel's place alone. A batch norm between y and the maximum is a factor of G and a shift of the maximum.
//
//   dy_i = one_hot(i = argmax) g + offset + slope y_i      (the last two terms: a batch norm with the batch's statistics)
//   dS_ij = P_ij (dy_i . v_j - sum_j P_ij dy_i . v_j),  dv_j = sum_i P_ij dy_i,  and from there by the chain rule
//
// The 16 pixels of a block are the lanes of a vector, of queries (i), of keys (j) or of 16 channels in turn.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

#define STEM_CALLED __attribute__((always_inline))
#define STEM_INLINE inline STEM_CALLED
#define UNROLL _Pragma("GCC unroll 16")
// The outer loop of a product: unrolled where 16 vectors stay in registers.
#ifdef __AVX512F__
#define OUTER UNROLL
#else
#define OUTER _Pragma("GCC unroll 1")
#endif

namespace {

constexpr int SIDE = 4, PIXELS = 16, COLOURS = 3, OFFSETS = 2 * SIDE - 1, FORM = COLOURS + 2 * OFFSETS;

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
  const float* form;    // [heads, 3, 3 + 7 + 7]: A, U and W
  const float* places;  // G: [16, heads * channels, 3], or null:
  const float* v;       // v itself, [batch, height, width, heads * channels]
  const float* shift;   // [heads * channels], or null: what is added before max(., 0)
  float* top;           // [batch, blocks down, blocks across, heads * channels] by these strides
  int64_t top_image, top_channel, top_row, top_block;
  uint8_t* argmax;   // [batch, blocks down, blocks across, heads * channels], or null
  const float* base; // with `sums`: [heads * channels], about the mean of y
  double* sums;      // null, or [threads, 2, heads * channels]: of y - base and of its square
  // Backward.
  const float *gradient, *offset, *slope;  // g [batch, blocks down, blocks across, C]; [C] or both null
  float *dx, *dv;                          // null or contiguous [batch, 3, height, width], [batch, height, width, C]
  double *dform, *dplaces;                 // [threads, heads, 3, 17], [threads, 16, C, 3]
};

// The form of one head in base 2, by query lanes.
struct Form {
  V row[COLOURS][SIDE], column[COLOURS][SIDE];
  float a[COLOURS][COLOURS];
};

struct Packed {
  int64_t vectors;  // of 16 channels in a head
  std::vector<float> memory;
  Form* forms;
  V *by_place, *by_channel;  // [heads, vectors, 16 places, 3] of 16 channels; [heads, vectors, 16 channels, 3] of 16 places
  V *shift, *base, *offset, *slope;  // [heads, vectors]

  explicit Packed(const Problem& p) : vectors((p.channels + PIXELS - 1) / PIXELS) {
    const int64_t groups = p.heads * vectors, table = groups * PIXELS * COLOURS;
    const int64_t floats = p.heads * (sizeof(Form) / 4) + (2 * table + 4 * groups) * PIXELS;
    memory.assign(floats + PIXELS, 0.0f);
    auto at = reinterpret_cast<uintptr_t>(memory.data());
    auto* next = reinterpret_cast<char*>((at + sizeof(V) - 1) / sizeof(V) * sizeof(V));
    forms = reinterpret_cast<Form*>(next), next += p.heads * sizeof(Form);
    by_place = reinterpret_cast<V*>(next), next += table * sizeof(V);
    by_channel = reinterpret_cast<V*>(next), next += table * sizeof(V);
    for (V** each : {&shift, &base, &offset, &slope}) *each = reinterpret_cast<V*>(next), next += groups * sizeof(V);
    for (int64_t h = 0; h < p.heads; ++h) pack_form(p.form + h * COLOURS * FORM, forms[h]);
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t c = 0; c < p.channels; ++c) {
        const int64_t group = h * vectors + c / PIXELS, lane = c % PIXELS, channel = h * p.channels + c;
        if (p.shift) shift[group][lane] = p.shift[channel];
        if (p.base) base[group][lane] = p.base[channel];
        if (p.offset) offset[group][lane] = p.offset[channel], slope[group][lane] = p.slope[channel];
        if (!p.places) continue;
        for (int64_t j = 0; j < PIXELS; ++j)
          for (int64_t k = 0; k < COLOURS; ++k) {
            const float g = p.places[(j * p.heads * p.channels + channel) * COLOURS + k];
            by_place[(group * PIXELS + j) * COLOURS + k][lane] = g;
            by_channel[(group * PIXELS + lane) * COLOURS + k][j] = g;
          }
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
  int64_t pixel(const Problem& p, int i) const {
    return (image * p.height + top + i / SIDE) * p.width + left + i % SIDE;
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

// Sixteen channels of v at pixel j of a block; pixels outside have 0.
STEM_INLINE V loaded(const Problem& p, const Block& b, int64_t channel, int64_t count, int j) {
  V v = V{};
  if (b.inside(j)) std::memcpy(&v, p.v + b.pixel(p, j) * p.heads * p.channels + channel, count * sizeof(float));
  return v;
}

void forward_row(const Problem& p, const Packed& packed, int64_t image, int64_t down, double* sums, V* totals,
                 float* line, uint8_t* marks) {
  const int64_t across = (p.width + SIDE - 1) / SIDE, vectors = packed.vectors, groups = p.heads * vectors;
  for (int64_t at = 0; at < across; ++at) {
    const Block b(p, image, down, at);
    alignas(64) float x[COLOURS][PIXELS], t[COLOURS][PIXELS];
    for (int k = 0; k < COLOURS; ++k) std::memcpy(x[k], &b.x[k], sizeof(V));
    for (int64_t h = 0; h < p.heads; ++h) {
      alignas(64) V weights[PIXELS];
      attend(packed.forms[h], b, weights, t);
      const float* a = reinterpret_cast<const float*>(weights);
      for (int64_t part = 0; part < vectors; ++part) {
        const int64_t group = h * vectors + part, count = std::min<int64_t>(PIXELS, p.channels - part * PIXELS);
        V v[PIXELS];
        if (p.places) {
          const V* g = packed.by_place + group * PIXELS * COLOURS;
          UNROLL for (int j = 0; j < PIXELS; ++j) {
            v[j] = g[j * COLOURS] * x[0][j];
            v[j] += g[j * COLOURS + 1] * x[1][j];
            v[j] += g[j * COLOURS + 2] * x[2][j];
          }
        } else {
          for (int j = 0; j < PIXELS; ++j) v[j] = loaded(p, b, h * p.channels + part * PIXELS, count, j);
        }
        V top = splat(-__builtin_inff()), total = V{}, squares = V{};
        VI mark = VI{};
        for (int i0 = 0; i0 < PIXELS; i0 += 8) {
          V y[8];
          UNROLL for (int i = 0; i < 8; ++i) y[i] = v[0] * a[i0 + i];
          OUTER for (int j = 1; j < PIXELS; ++j) {
            UNROLL for (int i = 0; i < 8; ++i) y[i] += v[j] * a[j * PIXELS + i0 + i];
          }
          if (!p.argmax && b.whole()) {
            if (i0 == 0) top = y[0];
            UNROLL for (int i = 0; i < 8; ++i) top = vmax(y[i], top);
            continue;
          }
          const auto take = [&](int i) STEM_CALLED {
            const V off = y[i] - packed.base[group];
            total += off;
            squares += off * off;
            const VI smaller = (VI)(y[i] <= top);  // false for NaN, which so takes the place of the largest
            top = smaller ? top : y[i];
            mark = smaller ? mark : VI{} + (i0 + i);
          };
          if (b.whole()) {
            UNROLL for (int i = 0; i < 8; ++i) take(i);
          } else {
            for (int i = 0; i < 8; ++i)
              if (b.inside(i0 + i)) take(i);
          }
        }
        if (p.shift) {
          top += packed.shift[group];
          top = vmax(splat(0.0f), top);  // NaN stays NaN
        }
        std::memcpy(line + (at * groups + group) * PIXELS, &top, sizeof top);
        if (p.argmax) {
          const Bytes narrow = __builtin_convertvector(mark, Bytes);
          std::memcpy(marks + (at * groups + group) * PIXELS, &narrow, sizeof narrow);
        }
        if (sums) {
          totals[2 * group] += total;
          totals[2 * group + 1] += squares;
        }
      }
    }
  }
  const int64_t rows = (p.height + SIDE - 1) / SIDE;
  float* to = p.top + image * p.top_image + down * p.top_row;
  uint8_t* index = p.argmax ? p.argmax + (image * rows + down) * across * p.heads * p.channels : nullptr;
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t part = 0; part < vectors; ++part) {
      const int64_t count = std::min<int64_t>(PIXELS, p.channels - part * PIXELS);
      const int64_t from = (h * vectors + part) * PIXELS, channel = h * p.channels + part * PIXELS;
      if (sums) {
        V* both = totals + 2 * (h * vectors + part);
        for (int64_t c = 0; c < count; ++c) {
          sums[channel + c] += both[0][c];
          sums[p.heads * p.channels + channel + c] += both[1][c];
        }
        both[0] = both[1] = V{};
      }
      if (p.top_channel == 1)
        for (int64_t at = 0; at < across; ++at)
          std::memcpy(to + at * p.top_block + channel, line + at * groups * PIXELS + from, count * sizeof(float));
      else
        for (int64_t c = 0; c < count; ++c)
          for (int64_t at = 0; at < across; ++at)
            to[(channel + c) * p.top_channel + at * p.top_block] = line[at * groups * PIXELS + from + c];
      if (index)
        for (int64_t at = 0; at < across; ++at)
          std::memcpy(index + at * p.heads * p.channels + channel, marks + at * groups * PIXELS + from, count);
    }
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

// Gradients of one head's form and values, summed by lanes.
struct FormSums {
  V a[COLOURS][COLOURS], row[COLOURS][SIDE], column[COLOURS][SIDE];
};

void backward_row(const Problem& p, const Packed& packed, int64_t image, int64_t down, FormSums* forms, V* places) {
  const int64_t across = (p.width + SIDE - 1) / SIDE, vectors = packed.vectors, all = p.heads * p.channels;
  const int64_t rows = (p.height + SIDE - 1) / SIDE;
  const VI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t at = 0; at < across; ++at) {
    const Block b(p, image, down, at);
    alignas(64) float t[COLOURS][PIXELS], x[COLOURS][PIXELS];
    for (int k = 0; k < COLOURS; ++k) std::memcpy(x[k], &b.x[k], sizeof(V));
    V inside = splat(1.0f);
    if (!b.whole())
      for (int i = 0; i < PIXELS; ++i) inside[i] = b.inside(i);
    const int64_t block = ((image * rows + down) * across + at) * all;
    V dx[COLOURS] = {};
    for (int64_t h = 0; h < p.heads; ++h) {
      const Form& form = packed.forms[h];
      alignas(64) V weights[PIXELS], turned[PIXELS], da[PIXELS] = {};
      attend(form, b, weights, t);
      std::memcpy(turned, weights, sizeof weights);
      transpose(turned);
      for (int64_t part = 0; part < vectors; ++part) {
        const int64_t group = h * vectors + part, first = h * p.channels + part * PIXELS;
        const int64_t count = std::min<int64_t>(PIXELS, p.channels - part * PIXELS);
        const V* g = packed.by_channel + group * PIXELS * COLOURS;
        alignas(64) V v[PIXELS], dy[PIXELS];  // [c], over keys and over queries
        if (p.places) {
          UNROLL for (int c = 0; c < PIXELS; ++c) {
            v[c] = b.x[0] * g[c * COLOURS];
            v[c] += b.x[1] * g[c * COLOURS + 1];
            v[c] += b.x[2] * g[c * COLOURS + 2];
          }
        } else {
          for (int j = 0; j < PIXELS; ++j) v[j] = loaded(p, b, first, count, j);
          transpose(v);
        }
        const float* value = reinterpret_cast<const float*>(v);
        const uint8_t* mark = p.argmax + block + first;
        const float* gradient = p.gradient + block + first;
        if (p.slope) {
          const V &offset = packed.offset[group], &slope = packed.slope[group];
          for (int c0 = 0; c0 < PIXELS; c0 += 8) {
            V y[8];
            UNROLL for (int c = 0; c < 8; ++c) y[c] = weights[0] * value[(c0 + c) * PIXELS];
            OUTER for (int j = 1; j < PIXELS; ++j) {
              UNROLL for (int c = 0; c < 8; ++c) y[c] += weights[j] * value[(c0 + c) * PIXELS + j];
            }
            UNROLL for (int c = 0; c < 8; ++c) dy[c0 + c] = (y[c] * slope[c0 + c] + offset[c0 + c]) * inside;
          }
        } else {
          for (int c = 0; c < PIXELS; ++c) dy[c] = V{};
        }
        for (int64_t c = 0; c < count; ++c) dy[c] += lane == VI{} + int32_t(mark[c]) ? splat(gradient[c]) : V{};
        for (int j0 = 0; j0 < PIXELS; j0 += 8) {
          V sum[8];
          UNROLL for (int j = 0; j < 8; ++j) sum[j] = da[j0 + j];
          OUTER for (int c = 0; c < PIXELS; ++c) {
            UNROLL for (int j = 0; j < 8; ++j) sum[j] += dy[c] * value[c * PIXELS + j0 + j];
          }
          UNROLL for (int j = 0; j < 8; ++j) da[j0 + j] = sum[j];
        }
        const float* arriving = reinterpret_cast<const float*>(dy);
        V* into = places + group * PIXELS * COLOURS;
        V dvs[PIXELS];
        for (int c0 = 0; c0 < PIXELS; c0 += 8) {
          V dv[8];
          UNROLL for (int c = 0; c < 8; ++c) dv[c] = turned[0] * arriving[(c0 + c) * PIXELS];
          OUTER for (int i = 1; i < PIXELS; ++i) {
            UNROLL for (int c = 0; c < 8; ++c) dv[c] += turned[i] * arriving[(c0 + c) * PIXELS + i];
          }
          UNROLL for (int c = 0; c < 8; ++c) {
            if (p.places) {
              UNROLL for (int k = 0; k < COLOURS; ++k) {
                into[(c0 + c) * COLOURS + k] += dv[c] * b.x[k];
                dx[k] += dv[c] * g[(c0 + c) * COLOURS + k];
              }
            }
            dvs[c0 + c] = dv[c];
          }
        }
        if (!p.places) {
          transpose(dvs);
          for (int j = 0; j < PIXELS; ++j)
            if (b.inside(j)) std::memcpy(p.dv + b.pixel(p, j) * all + first, &dvs[j], count * sizeof(float));
        }
      }
      V mean = V{};
      UNROLL for (int j = 0; j < PIXELS; ++j) mean += weights[j] * da[j];
      V ds[PIXELS], row[SIDE] = {}, column[SIDE] = {}, along[COLOURS] = {};
      UNROLL for (int j = 0; j < PIXELS; ++j) {
        ds[j] = weights[j] * (da[j] - mean);
        row[j / SIDE] += ds[j];
        column[j % SIDE] += ds[j];
        UNROLL for (int k = 0; k < COLOURS; ++k) along[k] += ds[j] * t[k][j];
      }
      FormSums& sums = forms[h];
      UNROLL for (int k = 0; k < COLOURS; ++k) {
        UNROLL for (int s = 0; s < SIDE; ++s) {
          sums.row[k][s] += row[s] * b.x[k];
          sums.column[k][s] += column[s] * b.x[k];
          along[k] += row[s] * form.row[k][s] + column[s] * form.column[k][s];
        }
        dx[k] += along[k] * LN2;
      }
      transpose(ds);
      V dt[COLOURS] = {};
      OUTER for (int i = 0; i < PIXELS; ++i) {
        UNROLL for (int k = 0; k < COLOURS; ++k) dt[k] += ds[i] * x[k][i];
      }
      UNROLL for (int k = 0; k < COLOURS; ++k) {
        UNROLL for (int l = 0; l < COLOURS; ++l) {
          sums.a[k][l] += dt[k] * b.x[l];
          dx[l] += dt[k] * (form.a[k][l] * LN2);
        }
      }
    }
    if (p.dx)
      for (int k = 0; k < COLOURS; ++k)
        for (int i = 0; i < PIXELS; ++i)
          if (b.inside(i))
            p.dx[((image * COLOURS + k) * p.height + b.top + i / SIDE) * p.width + b.left + i % SIDE] = dx[k][i];
  }
}

// Adds the sums over a row of blocks to a thread's own, in double precision, and clears them.
void add_up(const Problem& p, const Packed& packed, FormSums* forms, V* places, double* dform, double* dplaces) {
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int k = 0; k < COLOURS; ++k) {
      double *a = dform + (h * COLOURS + k) * FORM, *u = a + COLOURS, *w = u + OFFSETS;
      for (int i = 0; i < PIXELS; ++i) {
        for (int l = 0; l < COLOURS; ++l) a[l] += forms[h].a[k][l][i];
        for (int s = 0; s < SIDE; ++s) {
          u[s - i / SIDE + SIDE - 1] += forms[h].row[k][s][i];
          w[s - i % SIDE + SIDE - 1] += forms[h].column[k][s][i];
        }
      }
    }
    std::memset(static_cast<void*>(&forms[h]), 0, sizeof(FormSums));
    if (!p.places) continue;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int k = 0; k < COLOURS; ++k) {
        V& sum = places[((h * packed.vectors + c / PIXELS) * PIXELS + c % PIXELS) * COLOURS + k];
        for (int64_t j = 0; j < PIXELS; ++j)
          dplaces[(j * p.heads * p.channels + h * p.channels + c) * COLOURS + k] += sum[j];
        sum = V{};
      }
  }
}

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

extern "C" int32_t sasa_stem_problem_bytes() { return sizeof(Problem); }

extern "C" void sasa_stem_forward(const Problem* problem) {
  const Problem& p = *problem;
  const Packed packed(p);
  const int64_t rows = (p.height + SIDE - 1) / SIDE, across = (p.width + SIDE - 1) / SIDE;
  const int64_t line = across * p.heads * packed.vectors * PIXELS;
  parallel(p.batch * rows, p.threads, [&](int64_t thread, int64_t begin, int64_t end) {
    std::vector<float> top(line);
    std::vector<uint8_t> marks(p.argmax ? line : 0);
    std::vector<float> memory((2 * p.heads * packed.vectors + 1) * PIXELS);  // zeros, with room to align them
    const auto at = (reinterpret_cast<uintptr_t>(memory.data()) + sizeof(V) - 1) / sizeof(V) * sizeof(V);
    auto* totals = reinterpret_cast<V*>(at);
    double* sums = p.sums ? p.sums + thread * 2 * p.heads * p.channels : nullptr;
    for (int64_t row = begin; row < end; ++row)
      forward_row(p, packed, row / rows, row % rows, sums, totals, top.data(), marks.data());
  });
}

extern "C" void sasa_stem_backward(const Problem* problem) {
  const Problem& p = *problem;
  const Packed packed(p);
  const int64_t rows = (p.height + SIDE - 1) / SIDE;
  parallel(p.batch * rows, p.threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const int64_t vectors = p.heads * packed.vectors * PIXELS * COLOURS;
    const size_t bytes = p.heads * sizeof(FormSums) + vectors * sizeof(V);
    std::vector<char> memory(bytes + sizeof(V), 0);
    auto at = (reinterpret_cast<uintptr_t>(memory.data()) + sizeof(V) - 1) / sizeof(V) * sizeof(V);
    auto* forms = reinterpret_cast<FormSums*>(at);
    auto* places = reinterpret_cast<V*>(at + p.heads * sizeof(FormSums));
    double* dform = p.dform + thread * p.heads * COLOURS * FORM;
    double* dplaces = p.places ? p.dplaces + thread * PIXELS * p.heads * p.channels * COLOURS : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      backward_row(p, packed, row / rows, row % rows, forms, places);
      add_up(p, packed, forms, places, dform, dplaces);
    }
  });
}
