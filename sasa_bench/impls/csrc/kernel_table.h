// What the torch binding and the kernel builds agree on.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sasa {

enum class Scalar : int32_t { float32, bfloat16, float16 };

// A tensor [images, heads * channels, H, W], strides in elements: its pixels lie one behind the other, `column` elements
// apart, which is 1, or more where the channels of a pixel are contiguous (channel = 1). data may be null.
// Where `pixel` is not 0, the tensor is interleaved instead, as the kernels compute: [images, H * W, heads / lanes, ..., channels, lanes], `pixel` elements from pixel to pixel, `group` from group to group.
struct Planes {
  void* data = nullptr;
  int64_t image = 0, channel = 0;
  Scalar scalar = Scalar::float32;
  int64_t pixel = 0, group = 0;
  int64_t column = 1;
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
  // Applied to y as it is stored, forward only: one summand a channel (null: none), then max(0, .).
  const float* bias = nullptr;
  bool relu = false;
  // Of each query's softmax, [images, heads, H, W] float32: the largest logit, and the sum of exp(logit - largest). Null if
  // not wanted.
  Planes top, sum;
  const void *rel_row = nullptr, *rel_col = nullptr;  // contiguous [heads, channels / 2, K], [heads, rest, K]
  Planes dy, dq, dk, dv;
  void *drel_row = nullptr, *drel_col = nullptr;
  void* drel_parts = nullptr;  // [groups, row blocks, K * channels, lanes] float32
};

// Rows [from, to) and columns [left, right) of the planes of one group.
struct Band {
  int64_t group, from, to, left, right;
};

// Bands begin at multiples of so many columns; what is computed there depends on nothing before it.
inline int64_t column_step(const Problem& p) { return p.width > 16 ? 8 : 4; }

// Whether a tensor lies in memory as the kernels compute.
inline bool in_place(const Planes& t) { return t.pixel && t.data && t.scalar == Scalar::float32; }

// Whether keys and values do, so that a band reads those around it at no extra cost.
inline bool keys_in_place(const Problem& p) { return !p.project && in_place(p.k); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A problem in tasks, `lanes` planes a group and `rows` rows a block: one for each group where the groups fill the threads, else
// bands of rows of each group. A band reads the rows around it once more, so there are no more of them than it takes. Where
// that costs nothing (`free`), bands are cut by columns too if that shortens what the busiest thread does.
struct Tasks {
  const Problem& problem;
  int64_t rows, groups, blocks, steps, bands = 1, parts = 1;

  Tasks(const Problem& p, int64_t lanes, int64_t rows_, int64_t threads, bool free = false)
      : problem(p), rows(rows_), groups(ceil_div(p.planes, lanes)), blocks(ceil_div(p.height, rows)),
        steps(ceil_div(p.width, column_step(p))) {
    if (groups % threads == 0 || groups >= 4 * threads) return;
    bands = ceil_div(threads, groups);
    while (groups * bands % threads != 0 && groups * bands < 4 * threads) ++bands;
    bands = std::min(bands, blocks);
    const auto longest = [&](int64_t n) { return ceil_div(groups * bands * n, threads) * ceil_div(steps, n); };
    for (int64_t n = 2; free && n <= steps; ++n)
      if (longest(n) < longest(parts)) parts = n;
  }
  int64_t count() const { return groups * bands * parts; }
  template <class Work>
  void run(int64_t task, Work work) const {
    const int64_t part = task % parts, band = task / parts % bands, step = column_step(problem);
    work(problem, Band{task / (parts * bands), blocks * band / bands * rows,
                       std::min(problem.height, blocks * (band + 1) / bands * rows), steps * part / parts * step,
                       std::min(problem.width, steps * (part + 1) / parts * step)});
  }
};

constexpr int64_t PANEL = 32;  // columns of a packed matrix that lie together

// out[g][i][j] (+)= sum_k a[g][i][k] b[k][j] for g < groups, i < rows, j < columns, k < depth, summed in float32.
// Strides in elements.
struct Product {
  int64_t groups = 1, rows = 0, columns = 0, depth = 0;
  const void* a = nullptr;
  Scalar scalar = Scalar::float32;  // of a, and of what b was packed from
  int64_t a_group = 0, a_row = 0, a_k = 0;
  const float* b = nullptr;  // [panel][Table::packed_rows][PANEL], four bytes each, by `pack` or `pack_pixels`
  void* out = nullptr;
  Scalar out_scalar = Scalar::float32;
  int64_t out_group = 0, out_row = 0, out_column = 1;
  const int64_t* out_at = nullptr;  // if not null, where row i is, instead of i * out_row
  bool add = false;
};

// A matrix b[k][j] to be packed: column j is the `depth` elements from b + at[j] on, side by side.
struct Pack {
  int64_t columns = 0, depth = 0;
  const void* b = nullptr;
  Scalar scalar = Scalar::float32;
  const int64_t* at = nullptr;  // [columns], in elements
  float* out = nullptr;
};

// What a library of kernels exports: one for the forward pass and one for the backward pass, with the functions of the other
// null.
struct Table {
  int32_t version;
  int32_t lanes;  // planes per group
  int32_t rows;   // rows per block: a band of rows starts at a multiple of it
  // Bands do not depend on each other and write nothing in common. Those of `backward` have every column.
  void (*forward)(const Problem&, const Band&);
  void (*backward)(const Problem&, const Band&);
  void (*reduce_relative)(const Problem&, int64_t head);
};

// Products of matrices, in builds of their own: processors differ in them where the kernels above are the same.
struct Products {
  int32_t version;
  int32_t tile_rows;
  // Tiles [tile, tile_end) of rows, tiles_of() each group, and panels [panel, panel_end). Every element of the result is
  // the same sum whatever the ranges.
  void (*product)(const Product&, int64_t tile, int64_t tile_end, int64_t panel, int64_t panel_end);
  // Rows of a panel that is `depth` deep: float32, to which float16 is widened, or pairs of bfloat16 one below the other
  // where the processor multiplies those.
  int64_t (*packed_rows)(int64_t depth, Scalar);
  void (*pack)(const Pack&, int64_t panel);
  // `count` channels of the pixels of one image, from `channel` on, as a panel, zeros beyond `count`. If `at` is not null, it
  // says where each pixel is, its channels side by side.
  void (*pack_pixels)(const Planes&, int64_t image, int64_t channel, int64_t count, int64_t pixels, const int64_t* at,
                      float* out);
};

// Tiles that the rows of a group are cut into.
inline int64_t tiles_of(const Product& p, int64_t tile_rows) { return (p.rows + tile_rows - 1) / tile_rows; }
inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

constexpr int32_t TABLE_VERSION = 7;

}  // namespace sasa
