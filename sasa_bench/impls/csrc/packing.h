// Right operands of products in panels of PANEL columns, four bytes an element.
#pragma once

#include "products.h"

namespace SASA_ISA {

// Whether bfloat16 stays as it is, two elements of a column to four bytes; else it is widened, as float16 always is.
#ifdef SASA_PAIRS
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
template <class T>
constexpr bool in_pairs = PAIRS && std::is_same_v<T, uint16_t>;
constexpr int64_t TILE_PAIRS = 16;  // rows of a tile of AMX

inline int64_t packed_rows(int64_t depth, Scalar scalar) {
  if (scalar != Scalar::bfloat16 || !PAIRS) return depth;
  return (depth + 2 * TILE_PAIRS - 1) / (2 * TILE_PAIRS) * TILE_PAIRS;
}

template <class T>
int64_t words_of(int64_t depth) {
  return in_pairs<T> ? packed_rows(depth, Scalar::bfloat16) : depth;
}

// PANEL columns of `rows` whole elements each, T widened to four bytes, from[j] null for a column of zeros.
template <class T>
void pack_columns(const T* const* from, int64_t rows, float* out) {
  const int64_t whole = rows / LANES * LANES;
  for (int64_t j = 0; j < PANEL; j += LANES) {
    for (int64_t k = 0; k < whole; k += LANES) {
      V r[LANES];
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { r[l] = from[j + l] ? load_pixels(from[j + l] + k) : V{}; });
      transpose(r);
      unroll<LANES>([&](auto l) SASA_ALWAYS_INLINE { std::memcpy(out + (k + l) * PANEL + j, &r[l], sizeof(V)); });
    }
    for (int64_t k = whole; k < rows; ++k)
      for (int64_t l = 0; l < LANES; ++l) {
        T x{};
        if (from[j + l]) std::memcpy(&x, from[j + l] + k, sizeof x);
        out[k * PANEL + j + l] = widen(x);
      }
  }
}

// The last element of columns of odd depth, and zeros below it, in a panel of pairs.
inline void end_pairs(const uint16_t* const* from, int64_t depth, float* out) {
  for (int64_t k = depth / 2; k < packed_rows(depth, Scalar::bfloat16); ++k)
    for (int64_t j = 0; j < PANEL; ++j) {
      const uint32_t word = 2 * k < depth && from[j] ? from[j][2 * k] : 0;
      std::memcpy(out + k * PANEL + j, &word, 4);
    }
}

inline void pack(const Pack& p, int64_t panel) {
  float* out = p.out + panel * packed_rows(p.depth, p.scalar) * PANEL;
  auto columns = [&]<class T>(const T* b, const T* (&from)[PANEL]) {
    for (int64_t j = 0; j < PANEL; ++j)
      from[j] = panel * PANEL + j < p.columns ? b + p.at[panel * PANEL + j] : nullptr;
  };
  with_type(p.scalar, [&]<class T>(Of<T>) {
    const T* from[PANEL];
    columns(static_cast<const T*>(p.b), from);
    if constexpr (in_pairs<T>) {
      const float* words[PANEL];
      for (int64_t j = 0; j < PANEL; ++j) words[j] = reinterpret_cast<const float*>(from[j]);
      pack_columns(words, p.depth / 2, out);
      end_pairs(from, p.depth, out);
    } else {
      pack_columns(from, p.depth, out);
    }
  });
}

// A panel whose row b[k] lies at k * stride, or at at[k] where that is not null; the first `count` columns exist.
template <class T>
void pack_rows(const T* from, int64_t stride, const int64_t* at, int64_t count, int64_t depth, float* out) {
  const int64_t rows = words_of<T>(depth);
  constexpr int64_t together = in_pairs<T> ? 2 : 1;
  T row[together][PANEL] = {};
  for (int64_t k = 0; k < rows; ++k, out += PANEL) {
    for (int64_t h = 0; h < together; ++h)
      if (const int64_t i = together * k + h; i >= depth)
        std::memset(row[h], 0, sizeof row[h]);
      else if (const T* begin = from + (at ? at[i] : i * stride); count == PANEL)
        std::memcpy(row[h], begin, sizeof row[h]);
      else
        std::copy_n(begin, count, row[h]);
    for (int64_t j = 0; j < PANEL; ++j) {
      if constexpr (together == 1) {
        out[j] = widen(row[0][j]);
      } else {
        const uint32_t word = uint32_t(row[0][j]) | uint32_t(row[1][j]) << 16;
        std::memcpy(out + j, &word, 4);
      }
    }
  }
}

inline void pack_pixels(const Planes& t, int64_t image, int64_t channel, int64_t count, int64_t pixels, const int64_t* at,
                        float* out) {
  const int64_t first = image * t.image + channel * t.channel;
  with_type(t.scalar, [&]<class T>(Of<T>) {
    const T* from = static_cast<const T*>(t.data) + first;
    if (at || t.column != 1) return pack_rows(from, t.column, at, count, pixels, out);
    int64_t column[PANEL];
    for (int64_t j = 0; j < count; ++j) column[j] = j * t.channel;
    pack({count, pixels, from, t.scalar, column, out}, 0);
  });
}

}  // namespace SASA_ISA
