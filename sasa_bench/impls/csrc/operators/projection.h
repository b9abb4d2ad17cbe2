// The product of the weights and x that makes q, k and v, laid out for the kernels: weights packed, rows made as a task needs
// them or all at once.
#pragma once

#include <array>
#include <vector>

#include "attention.h"

namespace {

// Whether q, k and v are made in the layout that the kernels compute in.
bool interleaves(int64_t heads) { return heads % table().lanes == 0; }

// Points q, k and v at the thirds of a tensor [images, 3 * channels, H * W], or into an interleaved one
// [images, H * W, groups, 3, channels of a head, lanes]. Its data may be missing.
void point(const sasa::Problem& p, sasa::Planes& q, sasa::Planes& k, sasa::Planes& v, const Tensor& qkv,
           bool interleaved) {
  const int64_t channels = p.heads * p.channels, pixels = p.height * p.width, lanes = table().lanes;
  const int64_t third = interleaved ? p.channels * lanes : channels * pixels;
  char* data = qkv.defined() ? static_cast<char*>(const_cast<void*>(qkv.const_data_ptr())) : nullptr;
  for (sasa::Planes* part : {&q, &k, &v}) {
    part->data = data;
    part->image = 3 * channels * pixels;
    part->channel = pixels;
    part->pixel = interleaved ? 3 * channels : 0;
    part->group = 3 * p.channels * lanes;
    part->scalar = p.scalar;
    if (data) data += third * qkv.element_size();
  }
}

// The rows of w_qkv, [q, k, v][head][channel], in the order [group of heads][q, k, v][channel][head].
std::vector<int64_t> rows_by_lane(int64_t heads, int64_t d) {
  const int64_t lanes = table().lanes;
  std::vector<int64_t> rows;
  rows.reserve(size_t(3 * heads * d));
  for (int64_t first = 0; first < heads; first += lanes)
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t c = 0; c < d; ++c)
        for (int64_t lane = 0; lane < lanes; ++lane) rows.push_back((part * heads + first + lane) * d + c);
  return rows;
}

float* words(const Tensor& packed) { return static_cast<float*>(packed.data_ptr()); }

// The columns of a packed matrix of w's dtype that is `depth` deep: its panels, their rows, and the elements of a row, of
// four bytes for each of PANEL columns.
std::array<int64_t, 3> packed_sizes(const Tensor& w, int64_t columns, int64_t depth) {
  return {sasa::panels_of(columns), products().packed_rows(depth, scalar(w)),
          sasa::PANEL * 4 / int64_t(w.element_size())};
}

// w_qkv [3 * channels, inputs] as the right operand of the projection: [groups of heads, panels, rows, elements].
Tensor pack_forward(const Tensor& w_, int64_t heads) {
  const Tensor w = w_.contiguous();
  const int64_t d = w.size(0) / (3 * heads), groups = heads / table().lanes, columns = w.size(0) / groups;
  const auto [panels, rows, elements] = packed_sizes(w, columns, w.size(1));
  std::vector<int64_t> at = rows_by_lane(heads, d);
  for (int64_t& row : at) row *= w.size(1);
  Tensor packed = at::empty({groups, panels, rows, elements}, w.options());
  const auto& t = products();
  sasa::parallel_for(groups * panels, [&, panels = panels, rows = rows](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels;
      t.pack({columns, w.size(1), w.const_data_ptr(), scalar(w), at.data() + group * columns,
              words(packed) + group * panels * rows * sasa::PANEL}, i % panels);
    }
  });
  return packed;
}

// The pixels of images [from, from + count), one behind the other, as right operand: [panels of channels, rows, elements].
void pack_images(const sasa::Planes& x, int64_t channels, int64_t pixels, int64_t from, int64_t count, const Tensor& packed,
                 const int64_t* at = nullptr) {
  const auto& t = products();
  const int64_t panels = packed.size(0), rows = packed.size(1);
  sasa::parallel_for(panels * count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / count, image = i % count, channel = panel * sasa::PANEL;
      t.pack_pixels(x, from + image, channel, std::min(sasa::PANEL, channels - channel), pixels, at,
                    words(packed) + (panel * rows + image * pixels) * sasa::PANEL);
    }
  });
}

// w_qkv as the right operand of the gradient of x: its rows by lane are what is summed over.
Tensor pack_backward(const Tensor& w_, int64_t heads) {
  const Tensor w = w_.contiguous();
  const int64_t rows = w.size(0), inputs = w.size(1);
  std::vector<int64_t> at = rows_by_lane(heads, rows / (3 * heads));
  for (int64_t& row : at) row *= inputs;
  Tensor packed = at::empty(packed_sizes(w, inputs, rows), w.options());
  pack_images({const_cast<void*>(w.const_data_ptr()), 0, 1, scalar(w)}, inputs, rows, 0, 1, packed, at.data());
  return packed;
}

// x [images, channels, H, W] as a product's left operand: a row a pixel.
void point(sasa::Product& p, const Tensor& x) {
  const sasa::Planes at = planes(x);
  p.groups = x.size(0);
  p.rows = x.size(2) * x.size(3);
  p.depth = x.size(1);
  p.a = x.const_data_ptr();
  p.scalar = at.scalar;
  p.a_group = at.image;
  p.a_row = at.column;
  p.a_k = at.channel;
}

constexpr int64_t LARGE = int64_t(512) << 10;  // bytes: a right operand that threads should not all read

void multiply(const sasa::Product& p) {
  const sasa::Products& t = products();
  const int64_t tiles = p.groups * sasa::tiles_of(p, t.tile_rows), panels = sasa::panels_of(p.columns);
  if (panels * sasa::PANEL * t.packed_rows(p.depth, p.scalar) * 4 > LARGE)
    sasa::parallel_for(panels, [&](int64_t begin, int64_t end) { t.product(p, 0, tiles, begin, end); });
  else
    sasa::parallel_for(tiles, [&](int64_t begin, int64_t end) { t.product(p, begin, end, 0, panels); });
}

// The projection: all of it into qkv, or the rows that a task needs next.
struct Projection {
  Tensor x, packed;
  int64_t heads_in_groups, columns, width;  // groups of heads of one image, columns of one such group

  Projection(const Tensor& x_, const Tensor& packed_, int64_t channels)
      : x(with_even_pixels(x_)), packed(packed_), heads_in_groups(packed.size(0)),
        columns(3 * channels / packed.size(0)), width(x.size(3)) {}

  sasa::Product of_group(int64_t group) const {
    sasa::Product p;
    point(p, x);
    p.columns = columns;
    p.b = words(packed) + group * packed.size(1) * packed.size(2) * sasa::PANEL;
    return p;
  }

  void into(const Tensor& qkv) const {
    for (int64_t group = 0; group < heads_in_groups; ++group) {
      sasa::Product p = of_group(group);
      p.out_row = heads_in_groups * columns;
      p.out_group = p.rows * p.out_row;
      p.out_scalar = scalar(qkv);
      p.out = static_cast<char*>(qkv.data_ptr()) + group * columns * qkv.element_size();
      if (p.groups) multiply(p);
    }
  }

  static void rows(const void* context, int64_t group, int64_t from, int64_t to, float* out, int64_t pixel) {
    const auto& self = *static_cast<const Projection*>(context);
    sasa::Product p = self.of_group(group % self.heads_in_groups);
    const int64_t first = group / self.heads_in_groups * p.a_group + from * self.width * p.a_row;
    p.a = static_cast<const char*>(p.a) + first * int64_t(self.x.element_size());
    p.groups = 1;
    p.rows = (to - from) * self.width;
    p.out = out;
    p.out_row = pixel;
    products().product(p, 0, sasa::tiles_of(p, products().tile_rows), 0, sasa::panels_of(p.columns));
  }
};

}  // namespace
