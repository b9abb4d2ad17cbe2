// The attention stem forward: one row of blocks.
#pragma once

#include "stem.h"

namespace stem {

// v[j]: sixteen channels of the value of pixel j.
STEM_INLINE void values_by_pixel(const Problem& p, const Packed& packed, const Block& b, const Patch& patch,
                                 const Group& group, const float (*x)[PIXELS], V* v) {
  if (p.places) {
    const V* g = packed.by_place + group.index * TAPS;
    UNROLL for (int j = 0; j < PIXELS; ++j) {
      v[j] = g[j * COLOURS] * x[0][j];
      v[j] += g[j * COLOURS + 1] * x[1][j];
      v[j] += g[j * COLOURS + 2] * x[2][j];
    }
    return;
  }
  for (int j0 = 0; j0 < PIXELS; j0 += TOGETHER) {
    const V* w = packed.taps + group.index * TAPS;
    V sum[TOGETHER] = {};
    for (int k = 0; k < COLOURS; ++k)
      for (int a = 0; a < SIDE; ++a)
        UNROLL for (int c = 0; c < SIDE; ++c, ++w) {
          UNROLL for (int j = 0; j < TOGETHER; ++j) sum[j] += *w * patch.x[k][(j0 + j) / SIDE + a][j % SIDE + c];
        }
    UNROLL for (int j = 0; j < TOGETHER; ++j) v[j0 + j] = sum[j];
  }
  if (!b.whole())
    for (int j = 0; j < PIXELS; ++j)
      if (!b.inside(j)) v[j] = V{};
}

// The largest y of a block, the pixel that has it, and sums over the block, of sixteen channels.
struct Largest {
  V top, total, squares;
  VI mark;
};

STEM_INLINE Largest largest(const Problem& p, const Block& b, const V* weights, const V* v, V base) {
  Largest found{splat(-__builtin_inff()), V{}, V{}, VI{}};
  const float* a = reinterpret_cast<const float*>(weights);
  for (int i0 = 0; i0 < PIXELS; i0 += 8) {
    V y[8];
    UNROLL for (int i = 0; i < 8; ++i) y[i] = v[0] * a[i0 + i];
    OUTER for (int j = 1; j < PIXELS; ++j) {
      UNROLL for (int i = 0; i < 8; ++i) y[i] += v[j] * a[j * PIXELS + i0 + i];
    }
    if (!p.argmax && b.whole()) {
      if (i0 == 0) found.top = y[0];
      UNROLL for (int i = 0; i < 8; ++i) found.top = vmax(y[i], found.top);
      continue;
    }
    const auto take = [&](int i) STEM_CALLED {
      const V off = y[i] - base;
      found.total += off;
      found.squares += off * off;
      const VI smaller = (VI)(y[i] <= found.top);  // false for NaN, which so takes the place of the largest
      found.top = smaller ? found.top : y[i];
      found.mark = smaller ? found.mark : VI{} + (i0 + i);
    };
    if (b.whole()) {
      UNROLL for (int i = 0; i < 8; ++i) take(i);
    } else {
      for (int i = 0; i < 8; ++i)
        if (b.inside(i0 + i)) take(i);
    }
  }
  return found;
}

// What a thread needs for a row of blocks: results [blocks across, groups] and sums [groups, 2].
struct ForwardRow {
  std::vector<float> top;
  std::vector<uint8_t> marks;
  Arena arena;
  V* totals;

  ForwardRow(const Problem& p, const Packed& packed)
      : top(p.across() * packed.groups * PIXELS), marks(p.argmax ? top.size() : 0),
        arena(2 * packed.groups * int64_t(sizeof(V))), totals(arena.take<V>(2 * packed.groups)) {}
};

// Of one group: its results to where they belong, its sums added to the thread's own, and cleared.
inline void store(const Problem& p, const Packed& packed, const Group& group, int64_t image, int64_t down, ForwardRow& row,
                  double* sums) {
  const int64_t across = p.across(), step = packed.groups * PIXELS, from = group.index * PIXELS;
  if (sums) {
    V* both = row.totals + 2 * group.index;
    for (int64_t c = 0; c < group.count; ++c) {
      sums[group.first + c] += both[0][c];
      sums[p.all_channels() + group.first + c] += both[1][c];
    }
    both[0] = both[1] = V{};
  }
  float* to = p.top + image * p.top_image + down * p.top_row + group.first * p.top_channel;
  if (p.top_channel == 1)
    for (int64_t at = 0; at < across; ++at)
      std::memcpy(to + at * p.top_block, row.top.data() + at * step + from, group.count * sizeof(float));
  else
    for (int64_t c = 0; c < group.count; ++c)
      for (int64_t at = 0; at < across; ++at)
        to[c * p.top_channel + at * p.top_block] = row.top[at * step + from + c];
  if (!p.argmax) return;
  uint8_t* index = p.argmax + (image * p.down() + down) * across * p.all_channels() + group.first;
  for (int64_t at = 0; at < across; ++at)
    std::memcpy(index + at * p.all_channels(), row.marks.data() + at * step + from, group.count);
}

inline void forward_row(const Problem& p, const Packed& packed, int64_t image, int64_t down, ForwardRow& row, double* sums) {
  Patch patch;
  for (int64_t at = 0; at < p.across(); ++at) {
    const Block b(p, image, down, at);
    if (p.filters) patch.load(p, b);
    alignas(64) float x[COLOURS][PIXELS], t[COLOURS][PIXELS];
    for (int k = 0; k < COLOURS; ++k) std::memcpy(x[k], &b.x[k], sizeof(V));
    for (int64_t h = 0; h < p.heads; ++h) {
      alignas(64) V weights[PIXELS];
      attend(packed.forms[h], b, weights, t);
      for (int64_t part = 0; part < packed.vectors; ++part) {
        const Group group(p, packed, h, part);
        V v[PIXELS];
        values_by_pixel(p, packed, b, patch, group, x, v);
        Largest found = largest(p, b, weights, v, packed.base[group.index]);
        if (p.shift) found.top = vmax(splat(0.0f), found.top + packed.shift[group.index]);  // NaN stays NaN
        const int64_t to = (at * packed.groups + group.index) * PIXELS;
        std::memcpy(row.top.data() + to, &found.top, sizeof(V));
        if (p.argmax) {
          const Bytes narrow = __builtin_convertvector(found.mark, Bytes);
          std::memcpy(row.marks.data() + to, &narrow, sizeof narrow);
        }
        if (sums) {
          row.totals[2 * group.index] += found.total;
          row.totals[2 * group.index + 1] += found.squares;
        }
      }
    }
  }
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t part = 0; part < packed.vectors; ++part)
      store(p, packed, Group(p, packed, h, part), image, down, row, sums);
}

}  // namespace stem
