// What the torch binding and the kernel builds agree on. Each build of the kernels exports one Table.
#pragma once

#include <cstdint>

namespace sasa {

enum class Scalar : int32_t { float32, bfloat16 };

// A tensor [images, heads * channels, H, W] whose rows are contiguous; strides in elements. data may be null.
// Where `pixel` is not 0, the tensor is interleaved instead, as the kernels compute: float32
// [images, H * W, heads / lanes, ..., channels, lanes], `pixel` elements from pixel to pixel, `group` from group to group.
struct Planes {
  void* data = nullptr;
  int64_t image = 0, channel = 0;
  Scalar scalar = Scalar::float32;
  int64_t pixel = 0, group = 0;
};

struct Problem {
  int64_t planes = 0;  // images * heads
  int64_t heads = 1, channels = 1, height = 1, width = 1, kernel = 1;  // channels: of one head
  bool zero_border = false, relative = false;
  Scalar scalar = Scalar::float32;  // of the relative embedding and its gradient
  Planes q, k, v, y;  // q, k, v and their gradients are interleaved all together or not at all
  // If not null, interleaved q, k and v do not exist yet: it writes rows [from, to) of one group to `out`, `pixel`
  // elements from pixel to pixel, as they are needed. Where q.data is null too, rows are dropped after use.
  void (*project)(const void* context, int64_t group, int64_t from, int64_t to, float* out, int64_t pixel) = nullptr;
  const void* context = nullptr;
  // Of each query's softmax, [images, heads, H, W] float32: the largest logit times log2(e), and the sum of
  // exp(logit - largest). Null if not wanted.
  Planes top, sum;
  const void *rel_row = nullptr, *rel_col = nullptr;  // contiguous [heads, channels / 2, K], [heads, rest, K]
  Planes dy, dq, dk, dv;
  void *drel_row = nullptr, *drel_col = nullptr;
  void* drel_parts = nullptr;  // [groups, row blocks, K * channels, lanes] float32
};

struct Table {
  int32_t version;
  int32_t lanes;  // planes per group
  int32_t rows;   // rows per block: a band of rows starts at a multiple of it
  // Rows [from, to) of the planes of one group. Bands do not depend on each other and write nothing in common.
  void (*forward)(const Problem&, int64_t group, int64_t from, int64_t to);
  void (*backward)(const Problem&, int64_t group, int64_t from, int64_t to);
  void (*reduce_relative)(const Problem&, int64_t head);
};

constexpr int32_t TABLE_VERSION = 2;

}  // namespace sasa
