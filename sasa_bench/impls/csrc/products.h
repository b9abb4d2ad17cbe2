// Matrix products whose operands stay where they are: the projections of the layer and their gradients.
//
// Float32: a is read element by element and broadcast, so that it may lie either way round: pixels of a channel side by side
// (NCHW) or channels of a pixel (NHWC). b lies in panels, as packing.h makes them.
#pragma once

#include "layout.h"

namespace SASA_ISA {

using sasa::PANEL;
using sasa::Pack;
using sasa::Product;

#if defined(__AVX512VL__)
typedef float F __attribute__((vector_size(64), may_alias));
constexpr int TILE_ROWS = 14;
#elif defined(__AVX2__)
typedef float F __attribute__((vector_size(32), may_alias));
constexpr int TILE_ROWS = 6;
#else
typedef float F __attribute__((vector_size(16), may_alias));
constexpr int TILE_ROWS = 4;
#endif
constexpr int F_LANES = sizeof(F) / 4, TILE_COLUMNS = 2 * F_LANES;
static_assert(PANEL % TILE_COLUMNS == 0);
constexpr int64_t DEPTH = 256;  // of a panel at a time, so that it stays in the first-level cache
constexpr int64_t TILES = 8;    // of rows that a panel is used for before the next

// Products of pairs of bfloat16, added: acc[j] + lo(*a) lo(b[j]) + hi(*a) hi(b[j]).
#if defined(SASA_SHIM)
#define SASA_PAIRS
inline F add_pairs(F acc, const float* a, F b) {
  auto half = [](const void* word, int i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(word) + 2 * i, 2);
    return widen(bits);
  };
  float words[F_LANES];
  std::memcpy(words, &b, sizeof b);
  for (int j = 0; j < F_LANES; ++j)
    for (int i = 0; i < 2; ++i) acc[j] += half(a, i) * half(words + j, i);
  return acc;
}
#elif defined(__AVX512BF16__)
#define SASA_PAIRS
SASA_INLINE F add_pairs(F acc, const float* a, F b) {
  int32_t word;
  std::memcpy(&word, a, 4);
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
}
#else
F add_pairs(F acc, const float* a, F b);  // never called
#endif

// R rows of TILE_COLUMNS columns: out[i][j] (+)= sum_k a[i * row + k * column] b[k * PANEL + j].
template <int R, bool PAIRS>
void product_tile(const float* a, int64_t row, int64_t column, const float* b, int64_t depth, float* const* out,
                  int64_t at, bool add) {
  F acc[R][2];
  unroll<R>([&](auto i) SASA_ALWAYS_INLINE {
    unroll<2>([&](auto v) SASA_ALWAYS_INLINE {
      acc[i][v] = F{};
      if (add) std::memcpy(&acc[i][v], out[i] + at + v * F_LANES, sizeof(F));
    });
  });
  for (int64_t k = 0; k < depth; ++k, a += column, b += PANEL) {
    F bv[2];
    unroll<2>([&](auto v) SASA_ALWAYS_INLINE { std::memcpy(&bv[v], b + v * F_LANES, sizeof(F)); });
    unroll<R>([&](auto i) SASA_ALWAYS_INLINE {
      if constexpr (PAIRS) {
        unroll<2>([&](auto v) SASA_ALWAYS_INLINE { acc[i][v] = add_pairs(acc[i][v], a + i * row, bv[v]); });
      } else {
        const F av = a[i * row] - F{};
        unroll<2>([&](auto v) SASA_ALWAYS_INLINE { acc[i][v] += av * bv[v]; });
      }
    });
  }
  unroll<R>([&](auto i) SASA_ALWAYS_INLINE {
    unroll<2>([&](auto v) SASA_ALWAYS_INLINE { std::memcpy(out[i] + at + v * F_LANES, &acc[i][v], sizeof(F)); });
  });
}

using Tile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float* const*, int64_t, bool);

template <bool PAIRS = false>
Tile tile_of(int64_t rows) {
  static const auto table = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Tile, sizeof...(R)>{&product_tile<R + 1, PAIRS>...};
  }(std::make_integer_sequence<int, TILE_ROWS>{});
  return table[size_t(rows - 1)];
}

// Rows [from, to) of one tile.
struct TileRows {
  int64_t group, from, to;
  TileRows(const Product& p, int64_t tile) {
    const int64_t tiles = sasa::tiles_of(p, TILE_ROWS), t = tile % tiles;
    group = tile / tiles;
    from = p.rows * t / tiles;
    to = p.rows * (t + 1) / tiles;
  }
};

// What was computed of a panel aside, rows tile by tile PANEL apart, to where it belongs.
template <class T>
void store_panel(const Product& p, int64_t tile, int64_t tile_end, int64_t panel, const float* whole, bool add) {
  const int64_t columns = std::min(PANEL, p.columns - panel * PANEL);
  for (; tile < tile_end; ++tile) {
    const TileRows r(p, tile);
    T* out = static_cast<T*>(p.out) + r.group * p.out_group + panel * PANEL * p.out_column;
    const int64_t rows = r.to - r.from;
    if (p.out_row == 1 && !add && rows >= LANES && columns % LANES == 0) {
      // Pixels of a channel side by side. The last LANES of them may overlap those before.
      for (int64_t i = 0;; i = std::min(i + LANES, rows - LANES)) {
        for (int64_t j = 0; j < columns; j += LANES) {
          V v[LANES];
          unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { v[l] = load_pixels(whole + (i + l) * PANEL + j); });
          transpose(v);
          unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE {
            store_pixels(out + r.from + i + (j + l) * p.out_column, v[l]);
          });
        }
        if (i + LANES >= rows) break;
      }
    } else if (p.out_column == 1 && !add && columns % LANES == 0) {
      for (int64_t i = 0; i < rows; ++i) {
        T* to = out + (p.out_at ? p.out_at[r.from + i] : (r.from + i) * p.out_row);
        for (int64_t j = 0; j < columns; j += LANES) store_pixels(to + j, load_pixels(whole + i * PANEL + j));
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        T* to = out + (p.out_at ? p.out_at[r.from + i] : (r.from + i) * p.out_row);
        for (int64_t j = 0; j < columns; ++j) {
          const float sum = add ? widen(to[j * p.out_column]) : 0.0f;
          to[j * p.out_column] = narrow<T>(sum + whole[i * PANEL + j]);
        }
      }
    }
    whole += rows * PANEL;
  }
}

// Elements [k, k_end) of the rows of `tiles` tiles as [k][row]: where rows lie side by side, far apart from k to k, each
// is copied once instead of being fetched anew for every panel. A left operand that is deep has left the cache by then.
inline const float* copy_rows(const Product& p, int64_t tile, int64_t tile_end, int64_t k, int64_t k_end, int64_t stride) {
  static thread_local std::vector<float> block;
  block.resize(size_t(DEPTH * TILES * TILE_ROWS));
  float* out = block.data();
  while (tile < tile_end) {
    const TileRows first(p, tile);
    const int64_t tiles = sasa::tiles_of(p, TILE_ROWS), last = std::min(tile_end, (tile / tiles + 1) * tiles);
    const int64_t rows = TileRows(p, last - 1).to - first.from;
    const float* from = static_cast<const float*>(p.a) + first.group * p.a_group + first.from;
    for (int64_t i = k; i < k_end; ++i)
      std::memcpy(out + (i - k) * stride, from + i * p.a_k, size_t(rows) * sizeof(float));
    out += rows;
    tile = last;
  }
  return block.data();
}

inline void product32(const Product& p, int64_t tile, int64_t tile_end, int64_t panel, int64_t panel_end) {
  alignas(64) float aside[TILES * TILE_ROWS * PANEL];
  const int64_t panels = panel_end - panel;
  const bool copies = p.a_row == 1 && p.a_k != 1 && (panels > 8 || (panels > 1 && p.depth > DEPTH));
  constexpr int64_t stride = TILES * TILE_ROWS;
  for (; tile < tile_end; tile += TILES) {
    const int64_t last = std::min(tile + TILES, tile_end);
    for (int64_t from = 0, to; from < p.depth; from = to) {
      to = copies ? std::min(p.depth, from + DEPTH) : p.depth;
      const float* copied = copies ? copy_rows(p, tile, last, from, to, stride) : nullptr;
      const bool add = p.add || from;
      for (int64_t j = panel; j < panel_end; ++j) {
        const bool direct = p.out_column == 1 && p.columns - j * PANEL >= PANEL && p.out_scalar == Scalar::float32;
        for (int64_t k = from; k < to; k += DEPTH) {
          const float* b = p.b + (j * p.depth + k) * PANEL;
          int64_t row = 0;
          for (int64_t t = tile; t < last; ++t) {
            const TileRows r(p, t);
            float* out[TILE_ROWS];
            for (int64_t i = r.from; i < r.to; ++i)
              out[i - r.from] = direct ? static_cast<float*>(p.out) + r.group * p.out_group +
                                             (p.out_at ? p.out_at[i] : i * p.out_row) + j * PANEL
                                       : aside + (row + i - r.from) * PANEL;
            const float* a = copies ? copied + row
                                    : static_cast<const float*>(p.a) + r.group * p.a_group + r.from * p.a_row + k * p.a_k;
            const Tile run = tile_of(r.to - r.from);
            for (int64_t at = 0; at < PANEL; at += TILE_COLUMNS)
              run(a, p.a_row, copies ? stride : p.a_k, b + at, std::min(DEPTH, to - k), out, at, (direct && add) || k > from);
            row += r.to - r.from;
          }
        }
        if (!direct) store_panel<float>(p, tile, last, j, aside, add);
      }
    }
  }
}

}  // namespace SASA_ISA
