// q, k and v of a layer: the product of packed weights and images that makes them, and where they lie. Knows neither torch nor
// ONNX Runtime.
#pragma once

#include <vector>

#include "kernel_table.h"

namespace sasa {

constexpr int64_t LARGE = int64_t(512) << 10;  // bytes: a right operand that threads should not all read

inline bool has_large_operand(const Product& p, int64_t packed_rows) {
  return panels_of(p.columns) * PANEL * packed_rows * 4 > LARGE;
}

// The rows of w_qkv, [q, k, v][head][channel], in the order [group of heads][q, k, v][channel][head].
inline std::vector<int64_t> rows_by_lane(int64_t heads, int64_t channels, int64_t lanes) {
  std::vector<int64_t> rows;
  rows.reserve(size_t(3 * heads * channels));
  for (int64_t first = 0; first < heads; first += lanes)
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t lane = 0; lane < lanes; ++lane) rows.push_back((part * heads + first + lane) * channels + c);
  return rows;
}

// Points q, k and v at the thirds of [images, 3 * channels, H * W], or, with `lanes`, into an interleaved tensor
// [images, H * W, groups of heads, 3, channels of a head, lanes]. `data` may be null.
inline void point_at_thirds(const Problem& p, Planes& q, Planes& k, Planes& v, void* data, int64_t element, int64_t lanes) {
  const int64_t channels = p.heads * p.channels, pixels = p.height * p.width;
  const int64_t third = lanes ? p.channels * lanes : channels * pixels;
  char* at = static_cast<char*>(data);
  for (Planes* part : {&q, &k, &v}) {
    part->data = at;
    part->image = 3 * channels * pixels;
    part->channel = pixels;
    part->pixel = lanes ? 3 * channels : 0;
    part->group = 3 * p.channels * lanes;
    part->scalar = p.scalar;
    if (at) at += third * element;
  }
}

// Whether the tasks of a forward pass project the rows that they need themselves, while they are in cache. Bands would project
// the rows around them once more, and weights that fill a cache are better read once for the whole batch.
inline bool in_parts(const Problem& p, int64_t bands, int64_t bytes_of_weights) {
  const int64_t twice = (bands - 1) * (p.kernel - 1);
  return (bands == 1 || twice * 8 <= p.height) && bytes_of_weights <= 2 * LARGE;
}

// Packed weights and the images that they are applied to.
struct Projection {
  const Products& products;
  Product product;             // of the first group of heads
  int64_t groups = 1;          // of heads of one image
  int64_t floats = 0;          // of the weights of a group
  int64_t width = 1;           // pixels of a row
  int64_t element = 4;         // bytes of an element of an image

  Product of_group(int64_t group) const {
    Product p = product;
    p.b += group * floats;
    return p;
  }

  // Problem::project, whose context is a Projection.
  static void rows(const void* context, int64_t group, int64_t from, int64_t to, float* out, int64_t pixel) {
    const auto& self = *static_cast<const Projection*>(context);
    Product p = self.of_group(group % self.groups);
    const int64_t first = group / self.groups * p.a_group + from * self.width * p.a_row;
    p.a = static_cast<const char*>(p.a) + first * self.element;
    p.groups = 1;
    p.rows = (to - from) * self.width;
    p.out = out;
    p.out_row = pixel;
    self.products.product(p, 0, tiles_of(p, self.products.tile_rows), 0, panels_of(p.columns));
  }
};

}  // namespace sasa
