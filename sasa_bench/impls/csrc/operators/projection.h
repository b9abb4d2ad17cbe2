// The product of the weights and x that makes q, k and v, laid out for the kernels: weights packed, rows made as a task needs
// them or all at once.
#pragma once

#include <array>
#include <vector>

#include "../qkv.h"
#include "attention.h"

namespace {

// Whether q, k and v are made in the layout that the kernels compute in.
bool interleaves(int64_t heads) { return heads % table().lanes == 0; }

// The lanes that q, k and v are interleaved in, 0 where they are not.
int64_t lanes_of(bool interleaved) { return interleaved ? table().lanes : 0; }

void point(const sasa::Problem& p, sasa::Planes& q, sasa::Planes& k, sasa::Planes& v, const Tensor& qkv,
           bool interleaved) {
  void* data = qkv.defined() ? const_cast<void*>(qkv.const_data_ptr()) : nullptr;
  sasa::point_at_thirds(p, q, k, v, data, qkv.defined() ? int64_t(qkv.element_size()) : 0, lanes_of(interleaved));
}

std::vector<int64_t> rows_by_lane(int64_t heads, int64_t d) { return sasa::rows_by_lane(heads, d, table().lanes); }

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

// Threads share the rows; or the columns, where the right operand is too large for all of them to read it.
void multiply(const sasa::Product& p, bool always_rows = false) {
  const sasa::Products& t = products();
  const int64_t tiles = p.groups * sasa::tiles_of(p, t.tile_rows), panels = sasa::panels_of(p.columns);
  if (!always_rows && sasa::has_large_operand(p, t.packed_rows(p.depth, p.scalar)))
    sasa::parallel_for(panels, [&](int64_t begin, int64_t end) { t.product(p, 0, tiles, begin, end); });
  else
    sasa::parallel_for(tiles, [&](int64_t begin, int64_t end) { t.product(p, begin, end, 0, panels); });
}

// x must have even pixels; packed: by pack_forward.
sasa::Projection projection_of(const Tensor& x, const Tensor& packed, int64_t channels) {
  sasa::Projection found{products(), {}};
  point(found.product, x);
  found.groups = packed.size(0);
  found.floats = packed.size(1) * packed.size(2) * sasa::PANEL;
  found.width = x.size(3);
  found.element = int64_t(x.element_size());
  found.product.columns = 3 * channels / found.groups;
  found.product.b = words(packed);
  return found;
}

void project_into(const sasa::Projection& projection, const Tensor& qkv) {
  for (int64_t group = 0; group < projection.groups; ++group) {
    sasa::Product p = projection.of_group(group);
    p.out_row = projection.groups * p.columns;
    p.out_group = p.rows * p.out_row;
    p.out_scalar = scalar(qkv);
    p.out = static_cast<char*>(qkv.data_ptr()) + group * p.columns * int64_t(qkv.element_size());
    if (p.groups) multiply(p);
  }
}

}  // namespace
