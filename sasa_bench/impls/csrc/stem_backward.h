// The attention stem backward: one row of blocks. y is computed again and never stored.
#pragma once

#include "stem.h"

namespace stem {

// Gradients of one head's form, summed by lanes.
struct FormSums {
  V a[COLOURS][COLOURS], row[COLOURS][SIDE], column[COLOURS][SIDE];
};

// What a thread sums over a row of blocks: of each head's form, and of each group's value weights: [16 channels, 3] of 16
// places, or [TAPS] of 16 channels.
struct BackwardRow {
  Arena arena;
  FormSums* forms;
  V* values;

  BackwardRow(const Problem& p, const Packed& packed)
      : arena(p.heads * int64_t(sizeof(FormSums)) + packed.groups * TAPS * int64_t(sizeof(V))),
        forms(arena.take<FormSums>(p.heads)), values(arena.take<V>(packed.groups * TAPS)) {}
};

// Of a convolution for values: each tap's colour by pixel of the block, and the gradients of these.
struct Taps {
  Patch patch;
  alignas(64) V x[TAPS], dx[TAPS];

  void load(const Problem& p, const Block& b) {
    patch.load(p, b);
    int t = 0;
    for (int k = 0; k < COLOURS; ++k)
      for (int a = 0; a < SIDE; ++a)
        UNROLL for (int c = 0; c < SIDE; ++c, ++t) {
          UNROLL for (int i = 0; i < SIDE; ++i)
            std::memcpy(reinterpret_cast<float*>(&x[t]) + i * SIDE, &patch.x[k][i + a][c], SIDE * sizeof(float));
          dx[t] = V{};
        }
  }

  // Adds the gradients to those of the image.
  void store(const Problem& p, const Block& b) const {
    typedef float Row __attribute__((vector_size(4 * SIDE)));
    Patch sum;
    int t = 0;
    for (int k = 0; k < COLOURS; ++k)
      for (int a = 0; a < SIDE; ++a)
        for (int c = 0; c < SIDE; ++c, ++t)
          for (int i = 0; i < SIDE; ++i) {
            Row into, from;
            float* at = &sum.x[k][i + a][c];
            std::memcpy(&into, at, sizeof into);
            std::memcpy(&from, reinterpret_cast<const float*>(&dx[t]) + i * SIDE, sizeof from);
            into += from;
            std::memcpy(at, &into, sizeof into);
          }
    for (int k = 0; k < COLOURS; ++k)
      for (int64_t r = 0; r < REACH; ++r)
        for (int64_t c = 0; c < REACH; ++c) {
          const int64_t row = b.top + r - BEFORE, column = b.left + c - BEFORE;
          if (row >= 0 && row < p.height && column >= 0 && column < p.width)
            p.dx[((b.image * COLOURS + k) * p.height + row) * p.width + column] += sum.x[k][r][c];
        }
  }
};

// out[n] (+)= sum over m of a[m] * b[m * step + n * stride], n < 16.
template <bool ADD, int TERMS>
STEM_INLINE void product(const V* a, const float* b, int step, int stride, V* out) {
  for (int n0 = 0; n0 < PIXELS; n0 += 8) {
    V sum[8];
    UNROLL for (int n = 0; n < 8; ++n) {
      sum[n] = a[0] * b[(n0 + n) * stride];
      if (ADD) sum[n] += out[n0 + n];
    }
    OUTER for (int m = 1; m < TERMS; ++m) {
      UNROLL for (int n = 0; n < 8; ++n) sum[n] += a[m] * b[m * step + (n0 + n) * stride];
    }
    UNROLL for (int n = 0; n < 8; ++n) out[n0 + n] = sum[n];
  }
}

// v[c]: the values of channel c of all pixels.
STEM_INLINE void values_by_channel(const Problem& p, const Packed& packed, const Block& b, const Taps& taps,
                                   const Group& group, V* v) {
  if (p.places) {
    const V* g = packed.by_channel + group.index * TAPS;
    UNROLL for (int c = 0; c < PIXELS; ++c) {
      v[c] = b.x[0] * g[c * COLOURS];
      v[c] += b.x[1] * g[c * COLOURS + 1];
      v[c] += b.x[2] * g[c * COLOURS + 2];
    }
    return;
  }
  const float* w = reinterpret_cast<const float*>(packed.taps + group.index * TAPS);
  for (int c0 = 0; c0 < PIXELS; c0 += TOGETHER) {
    V sum[TOGETHER] = {};
    for (int t = 0; t < TAPS; ++t) {
      UNROLL for (int c = 0; c < TOGETHER; ++c) sum[c] += taps.x[t] * w[t * PIXELS + c0 + c];
    }
    UNROLL for (int c = 0; c < TOGETHER; ++c) v[c0 + c] = sum[c];
  }
  if (!b.whole())
    for (int c = 0; c < PIXELS; ++c)
      for (int j = 0; j < PIXELS; ++j)
        if (!b.inside(j)) v[c][j] = 0.0f;
}

// dy[c]: what arrives at channel c of all pixels' y.
STEM_INLINE void output_gradient(const Problem& p, const Packed& packed, const Block& b, const Group& group, int64_t block,
                                 const V* weights, const V* v, V* dy) {
  const VI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (p.slope) {
    const V &offset = packed.offset[group.index], &slope = packed.slope[group.index];
    V inside = splat(1.0f);
    if (!b.whole())
      for (int i = 0; i < PIXELS; ++i) inside[i] = b.inside(i);
    product<false, PIXELS>(weights, reinterpret_cast<const float*>(v), 1, PIXELS, dy);
    UNROLL for (int c = 0; c < PIXELS; ++c) dy[c] = (dy[c] * slope[c] + offset[c]) * inside;
  } else {
    for (int c = 0; c < PIXELS; ++c) dy[c] = V{};
  }
  const uint8_t* mark = p.argmax + block * p.all_channels() + group.first;
  const float* gradient = p.gradient + block * p.all_channels() + group.first;
  for (int64_t c = 0; c < group.count; ++c) dy[c] += lane == VI{} + int32_t(mark[c]) ? splat(gradient[c]) : V{};
}

// From dv, by channel, to the value weights and the colours; turns dv over.
STEM_INLINE void values_backward(const Problem& p, const Packed& packed, const Block& b, Taps& taps, const Group& group,
                                 V* dv, V* dx, V* into) {
  if (p.places) {
    const V* g = packed.by_channel + group.index * TAPS;
    for (int c = 0; c < PIXELS; ++c) {
      UNROLL for (int k = 0; k < COLOURS; ++k) {
        into[c * COLOURS + k] += dv[c] * b.x[k];
        dx[k] += dv[c] * g[c * COLOURS + k];
      }
    }
    return;
  }
  const float* w = reinterpret_cast<const float*>(packed.taps + group.index * TAPS);
  if (p.dx)
    for (int t = 0; t < TAPS; t += PIXELS) product<true, PIXELS>(dv, w + t * PIXELS, 1, PIXELS, taps.dx + t);
  transpose(dv);
  for (int t = 0; t < TAPS; t += PIXELS)
    product<true, PIXELS>(dv, reinterpret_cast<const float*>(taps.x + t), 1, PIXELS, into + t);
}

// From da[j], the gradient of the softmax's weights by queries, to the form and the colours.
STEM_INLINE void form_backward(const Form& form, const Block& b, const float (*t)[PIXELS], const V* weights, const V* da,
                               FormSums& sums, V* dx) {
  V mean = V{};
  UNROLL for (int j = 0; j < PIXELS; ++j) mean += weights[j] * da[j];
  V ds[PIXELS], row[SIDE] = {}, column[SIDE] = {}, along[COLOURS] = {};
  UNROLL for (int j = 0; j < PIXELS; ++j) {
    ds[j] = weights[j] * (da[j] - mean);
    row[j / SIDE] += ds[j];
    column[j % SIDE] += ds[j];
    UNROLL for (int k = 0; k < COLOURS; ++k) along[k] += ds[j] * t[k][j];
  }
  UNROLL for (int k = 0; k < COLOURS; ++k) {
    UNROLL for (int s = 0; s < SIDE; ++s) {
      sums.row[k][s] += row[s] * b.x[k];
      sums.column[k][s] += column[s] * b.x[k];
      along[k] += row[s] * form.row[k][s] + column[s] * form.column[k][s];
    }
    dx[k] += along[k] * LN2;
  }
  transpose(ds);
  const float* x = reinterpret_cast<const float*>(b.x);
  V dt[COLOURS] = {};
  OUTER for (int i = 0; i < PIXELS; ++i) {
    UNROLL for (int k = 0; k < COLOURS; ++k) dt[k] += ds[i] * x[k * PIXELS + i];
  }
  UNROLL for (int k = 0; k < COLOURS; ++k) {
    UNROLL for (int l = 0; l < COLOURS; ++l) {
      sums.a[k][l] += dt[k] * b.x[l];
      dx[l] += dt[k] * (form.a[k][l] * LN2);
    }
  }
}

inline void backward_row(const Problem& p, const Packed& packed, int64_t image, int64_t down, BackwardRow& sums) {
  Taps taps;
  for (int64_t at = 0; at < p.across(); ++at) {
    const Block b(p, image, down, at);
    if (p.filters) taps.load(p, b);
    const int64_t block = (image * p.down() + down) * p.across() + at;
    V dx[COLOURS] = {};
    for (int64_t h = 0; h < p.heads; ++h) {
      alignas(64) float t[COLOURS][PIXELS];
      alignas(64) V weights[PIXELS], turned[PIXELS], da[PIXELS] = {};
      attend(packed.forms[h], b, weights, t);
      std::memcpy(turned, weights, sizeof weights);
      transpose(turned);
      for (int64_t part = 0; part < packed.vectors; ++part) {
        const Group group(p, packed, h, part);
        alignas(64) V v[PIXELS], dy[PIXELS], dv[PIXELS];
        values_by_channel(p, packed, b, taps, group, v);
        output_gradient(p, packed, b, group, block, weights, v, dy);
        product<true, PIXELS>(dy, reinterpret_cast<const float*>(v), PIXELS, 1, da);
        product<false, PIXELS>(turned, reinterpret_cast<const float*>(dy), 1, PIXELS, dv);
        values_backward(p, packed, b, taps, group, dv, dx, sums.values + group.index * TAPS);
      }
      form_backward(packed.forms[h], b, t, weights, da, sums.forms[h], dx);
    }
    if (!p.dx) continue;
    if (p.filters) taps.store(p, b);
    for (int k = 0; k < COLOURS; ++k)
      for (int i = 0; i < PIXELS; ++i)
        if (b.inside(i)) {
          float& to = p.dx[((image * COLOURS + k) * p.height + b.top + i / SIDE) * p.width + b.left + i % SIDE];
          to = p.filters ? to + dx[k][i] : dx[k][i];
        }
  }
}

// Adds the sums over a row of blocks to a thread's own, in double precision, and clears them.
inline void add_up(const Problem& p, const Packed& packed, BackwardRow& sums, double* dform, double* dvalues) {
  for (int64_t h = 0; h < p.heads; ++h) {
    FormSums& of_head = sums.forms[h];
    for (int k = 0; k < COLOURS; ++k) {
      double *a = dform + (h * COLOURS + k) * FORM, *u = a + COLOURS, *w = u + OFFSETS;
      for (int i = 0; i < PIXELS; ++i) {
        for (int l = 0; l < COLOURS; ++l) a[l] += of_head.a[k][l][i];
        for (int s = 0; s < SIDE; ++s) {
          u[s - i / SIDE + SIDE - 1] += of_head.row[k][s][i];
          w[s - i % SIDE + SIDE - 1] += of_head.column[k][s][i];
        }
      }
    }
    for (int64_t part = 0; part < packed.vectors; ++part) {
      const Group group(p, packed, h, part);
      const V* from = sums.values + group.index * TAPS;
      for (int64_t c = 0; c < group.count; ++c)
        for (int t = 0; t < TAPS; ++t) {
          if (p.filters)
            dvalues[(group.first + c) * TAPS + t] += from[t][c];
          else
            dvalues[(t / COLOURS * p.all_channels() + group.first + c) * COLOURS + t % COLOURS] +=
                from[c * COLOURS + t % COLOURS][t / COLOURS];
        }
    }
  }
  std::memset(static_cast<void*>(sums.forms), 0, p.heads * sizeof(FormSums));
  std::memset(static_cast<void*>(sums.values), 0, packed.groups * TAPS * sizeof(V));
}

}  // namespace stem
