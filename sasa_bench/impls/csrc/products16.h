// Products of matrices of 16 bits, summed in float32: bfloat16 on tiles (AMX), in pairs (AVX512-BF16) or widened, float16
// widened.
#pragma once

#include "packing.h"
#if defined(__AMX_BF16__) || defined(SASA_SHIM_TILES)
#define SASA_TILES
#include "amx.h"
#endif

namespace SASA_ISA {

constexpr int64_t DEPTH16 = 2048;  // elements of a row that are copied at once, unless the sum is to be rounded
constexpr int64_t BLOCK = TILES * TILE_ROWS, TILE = 16;

// A row of a as packed_rows words of four bytes: pairs, or widened elements.
template <class T>
void copy_row(const T* from, int64_t depth, int64_t words, float* out) {
  if constexpr (in_pairs<T>) {
    std::memcpy(out, from, size_t(depth) * 2);
    std::memset(reinterpret_cast<char*>(out) + depth * 2, 0, size_t(words) * 4 - size_t(depth) * 2);
  } else {
    for (int64_t k = 0; k < depth; ++k) out[k] = widen(from[k]);
  }
}

// The same for `rows` rows that lie side by side, elements of a row `a_k` apart; out is [row][words].
template <class T>
void copy_columns(const T* from, int64_t a_k, int64_t rows, int64_t depth, int64_t words, float* out) {
  auto word = [&](int64_t k, int64_t i) {
    if constexpr (in_pairs<T>) {
      uint32_t bits = 0;
      for (int64_t h = 0; h < 2; ++h)
        if (2 * k + h < depth) bits |= uint32_t(from[(2 * k + h) * a_k + i]) << (16 * h);
      float as;
      std::memcpy(&as, &bits, 4);
      return as;
    } else {
      return widen(from[k * a_k + i]);
    }
  };
  auto vector = [&](int64_t k, int64_t i) SASA_ALWAYS_INLINE {
    if constexpr (in_pairs<T>) {
      V lo{}, hi{};
      if (2 * k < depth) lo = load_pixels(from + 2 * k * a_k + i);
      if (2 * k + 1 < depth) hi = load_pixels(from + (2 * k + 1) * a_k + i);
      typedef uint32_t U __attribute__((vector_size(4 * LANES)));
      return (V)(((U)lo >> 16) | (U)hi);
    } else {
      return load_pixels(from + k * a_k + i);
    }
  };
  const int64_t whole = rows < LANES ? 0 : words / LANES * LANES;
  for (int64_t i = 0; whole; i = std::min(i + LANES, rows - LANES)) {
    for (int64_t k = 0; k < whole; k += LANES) {
      V r[LANES];
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { r[l] = vector(k + l, i); });
      transpose(r);
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { std::memcpy(out + (i + l) * words + k, &r[l], sizeof(V)); });
    }
    if (i + LANES >= rows) break;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = whole; k < words; ++k) out[i * words + k] = word(k, i);
}

// Elements [k, k + depth) of the rows of the tiles, [row][words].
template <class T>
const float* copy_block(const Product& p, int64_t tile, int64_t tile_end, int64_t k, int64_t depth, int64_t words) {
  static thread_local std::vector<float> block;
  block.resize(std::max(block.size(), size_t(BLOCK + TILE) * size_t(words)));
  float* out = block.data();
  for (; tile < tile_end; ++tile) {
    const TileRows r(p, tile);
    const T* from = static_cast<const T*>(p.a) + r.group * p.a_group + r.from * p.a_row + k * p.a_k;
    if (p.a_k == 1)
      for (int64_t i = 0; i < r.to - r.from; ++i) copy_row(from + i * p.a_row, depth, words, out + i * words);
    else
      copy_columns(from, p.a_k, r.to - r.from, depth, words, out);
    out += (r.to - r.from) * words;
  }
  return block.data();
}

#ifdef SASA_TILES
// R rows by one panel: two tiles of rows at a time, the last of which may begin before the end of the one before. Below
// TILE rows, as many are read and written all the same.
inline void tiled_panel(Tiles& tiles, const char* a, int64_t a_row, int64_t rows, const float* b, int64_t words, float* out,
                        int64_t out_row) {
  auto pass = [&](int64_t i, auto two) {
    const int64_t next = std::min(i + TILE, rows - TILE);
    tiles.zero<0>();
    tiles.zero<1>();
    if constexpr (two) {
      tiles.zero<2>();
      tiles.zero<3>();
    }
    for (int64_t k = 0; k < words; k += TILE_PAIRS) {
      tiles.load<6>(b + k * PANEL, PANEL * 4);
      tiles.load<7>(b + k * PANEL + TILE, PANEL * 4);
      tiles.load<4>(a + i * a_row + k * 4, a_row);
      tiles.multiply<0, 4, 6>();
      tiles.multiply<1, 4, 7>();
      if constexpr (two) {
        tiles.load<5>(a + next * a_row + k * 4, a_row);
        tiles.multiply<2, 5, 6>();
        tiles.multiply<3, 5, 7>();
      }
    }
    tiles.store<0>(out + i * out_row, out_row * 4);
    tiles.store<1>(out + i * out_row + TILE, out_row * 4);
    if constexpr (two) {
      tiles.store<2>(out + next * out_row, out_row * 4);
      tiles.store<3>(out + next * out_row + TILE, out_row * 4);
    }
  };
  int64_t i = 0;
  for (; i + TILE < rows; i += 2 * TILE) pass(i, std::true_type());
  if (i < rows) pass(std::max<int64_t>(0, std::min(i, rows - TILE)), std::false_type());
}
#endif

template <class T>
void product16(const Product& p, int64_t tile, int64_t tile_end, int64_t panel, int64_t panel_end) {
  alignas(64) float aside[(BLOCK + TILE) * PANEL];
  const int64_t panel_words = words_of<T>(p.depth);
#ifdef SASA_TILES
  constexpr bool tiled = std::is_same_v<T, uint16_t>;
  [[maybe_unused]] std::conditional_t<tiled, Tiles, char> tiles;
#else
  constexpr bool tiled = false;
#endif
  for (; tile < tile_end; tile += TILES) {
    const int64_t last = std::min(tile + TILES, tile_end);
    const TileRows head(p, tile), tail(p, last - 1);
    const bool one_group = head.group == tail.group;
    const int64_t most = p.out_scalar == Scalar::float32 ? DEPTH16 : p.depth;
    for (int64_t from = 0; from < p.depth; from += most) {
      const int64_t depth = std::min(most, p.depth - from), words = words_of<T>(depth);
      const bool add = p.add || from;
      int64_t rows = 0;
      for (int64_t t = tile; t < last; ++t) rows += TileRows(p, t).to - TileRows(p, t).from;
      const bool whole = one_group && rows >= TILE;
      const bool in_place = tiled && whole && p.a_k == 1 && depth == 2 * words;
      const void* a = in_place ? static_cast<const T*>(p.a) + head.group * p.a_group + head.from * p.a_row + from
                               : static_cast<const void*>(copy_block<T>(p, tile, last, from, depth, words));
      for (int64_t j = panel; j < panel_end; ++j) {
        const float* b = p.b + (j * panel_words + (in_pairs<T> ? from / 2 : from)) * PANEL;
        const bool direct = whole && !add && !p.out_at && p.out_column == 1 && p.columns - j * PANEL >= PANEL &&
                            p.out_scalar == Scalar::float32;
        float* out = direct ? static_cast<float*>(p.out) + head.group * p.out_group + head.from * p.out_row + j * PANEL
                            : aside;
        const int64_t out_row = direct ? p.out_row : PANEL;
        if constexpr (tiled) {
#ifdef SASA_TILES
          const int64_t a_row = in_place ? 2 * p.a_row : 4 * words;
          tiled_panel(tiles, static_cast<const char*>(a), a_row, rows, b, words, out, out_row);
#endif
        } else {
          for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            const int64_t count = std::min<int64_t>(TILE_ROWS, rows - i);
            float* to[TILE_ROWS];
            for (int64_t r = 0; r < count; ++r) to[r] = out + (i + r) * out_row;
            for (int64_t at = 0; at < PANEL; at += TILE_COLUMNS)
              tile_of<in_pairs<T>>(count)(static_cast<const float*>(a) + i * words, words, 1, b + at, words, to, at, false);
          }
        }
        if (!direct)
          with_type(p.out_scalar, [&]<class O>(Of<O>) { store_panel<O>(p, tile, last, j, aside, add); });
      }
    }
  }
}

inline void product(const Product& p, int64_t tile, int64_t tile_end, int64_t panel, int64_t panel_end) {
  switch (p.scalar) {
    case Scalar::float32: return product32(p, tile, tile_end, panel, panel_end);
    case Scalar::bfloat16: return product16<uint16_t>(p, tile, tile_end, panel, panel_end);
    case Scalar::float16: return product16<Half>(p, tile, tile_end, panel, panel_end);
  }
}

}  // namespace SASA_ISA
