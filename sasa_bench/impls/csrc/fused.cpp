// The torch operators over the kernels of local_attention.h. The kernels themselves live in libraries of their own,
// one per instruction set, so that this file is compiled once and for the least capable processor.
#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <torch/autograd.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace {

using at::Tensor;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

std::atomic<const sasa::Table*> kernels{nullptr};
std::atomic<const sasa::Products*> matrix_products{nullptr};

// The table that a build exports by the name `symbol`; null where the operating system forbids what it needs.
template <class T>
const T* table_of(c10::string_view path, const char* symbol) {
  const std::string name(path);
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "fused_local_attention: cannot load the kernels from ", name, ": ", dlerror());
  auto get = reinterpret_cast<const T* (*)()>(dlsym(library, symbol));
  const T* found = get ? get() : nullptr;
  TORCH_CHECK(get && (!found || found->version == sasa::TABLE_VERSION), "fused_local_attention: ", name,
              " is not a build of this version's kernels; delete it and load again");
  return found;
}

// Uses these builds from now on. Returns whether the operating system allows what the products need; if not, nothing
// changes.
bool use_kernels(c10::string_view path, c10::string_view products_path) {
  const auto* found = table_of<sasa::Table>(path, "sasa_kernel_table");
  const auto* products = table_of<sasa::Products>(products_path, "sasa_products_table");
  if (!products) return false;
  kernels = found;
  matrix_products = products;
  return true;
}

const sasa::Table& table() {
  const sasa::Table* t = kernels;
  TORCH_CHECK(t, "fused_local_attention: no kernels are loaded; call sasa_bench.impls.fused.load() first");
  return *t;
}

const sasa::Products& products() {
  table();
  return *matrix_products.load();
}

// ---------------------------------------------------------------------------------------------------------------
// Arguments

void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
           const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads) {
  constexpr auto op = "fused_local_attention: ";
  TORCH_CHECK_VALUE(q.dim() == 4, op, "q must be [batch, channels, height, width], got ", q.dim(),
                    " dimensions; reshape it");
  TORCH_CHECK_VALUE(k.sym_sizes() == q.sym_sizes() && v.sym_sizes() == q.sym_sizes(), op,
                    "q, k and v must have one shape, got ", q.sym_sizes(), ", ", k.sym_sizes(), " and ", v.sym_sizes(),
                    "; project them to the same number of channels");
  TORCH_CHECK_TYPE(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, op,
                   "dtype must be float32 or bfloat16, got ", q.scalar_type(), "; convert q, k and v with .to()");
  TORCH_CHECK_VALUE(heads >= 1 && q.sym_size(1) % heads == 0 && q.sym_size(1) >= heads, op,
                    "heads must be at least 1 and divide the channels, got ", heads, " heads for ", q.sym_size(1),
                    " channels; choose a divisor");
  TORCH_CHECK_VALUE(kernel_size >= 1 && kernel_size % 2 == 1, op, "kernel_size must be odd and at least 1, got ",
                    kernel_size, "; choose ", std::max<int64_t>(1, kernel_size + 1));
  TORCH_CHECK_VALUE(q.sym_size(2) >= 1 && q.sym_size(3) >= 1, op, "height and width must be at least 1, got ",
                    q.sym_sizes(), "; drop empty images before the call");
  TORCH_CHECK_VALUE(rel_row.has_value() == rel_col.has_value(), op,
                    "rel_row and rel_col go together, got only one; pass both (relative position) or neither");
  auto same = [&](const Tensor& t, const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), op, name, " must have q's dtype ", q.scalar_type(), ", got ",
                     t.scalar_type(), "; convert it with .to(q.dtype)");
    TORCH_CHECK_VALUE(t.device() == q.device(), op, name, " must be on q's device ", q.device(), ", got ", t.device(),
                      "; move it with .to(q.device)");
  };
  same(k, "k");
  same(v, "v");
  if (rel_row.has_value()) {
    const auto d = q.sym_size(1) / heads, half = d / 2;
    auto embedding = [&](const Tensor& t, const char* name, const c10::SymInt& n) {
      same(t, name);
      TORCH_CHECK_VALUE(t.dim() == 3 && t.sym_size(0) == heads && t.sym_size(1) == n && t.sym_size(2) == kernel_size,
                        op, name, " must be [heads, channels of its half, kernel_size] = [", heads, ", ", n, ", ",
                        kernel_size, "], got ", t.sym_sizes(), "; make it that shape");
    };
    embedding(*rel_row, "rel_row", half);
    embedding(*rel_col, "rel_col", d - half);
  }
}

// The kernels walk over pixels that lie one behind the other, either in planes or with the channels of a pixel side by
// side; images, and channels of planes, may have any stride.
bool in_planes(const Tensor& t) {
  return (t.stride(3) == 1 || t.size(3) == 1) && (t.stride(2) == t.size(3) || t.size(2) == 1);
}

int64_t from_pixel_to_pixel(const Tensor& t) { return t.size(3) > 1 ? t.stride(3) : t.stride(2); }

bool channels_together(const Tensor& t) {
  const bool even = t.size(2) == 1 || t.size(3) == 1 || t.stride(2) == t.size(3) * t.stride(3);
  return t.stride(1) == 1 && even && from_pixel_to_pixel(t) > 1;
}

Tensor with_even_pixels(const Tensor& t) { return in_planes(t) || channels_together(t) ? t : t.contiguous(); }

sasa::Scalar scalar(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16 ? sasa::Scalar::bfloat16 : sasa::Scalar::float32;
}

sasa::Planes planes(const Tensor& t) {
  sasa::Planes found{const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), scalar(t)};
  if (!in_planes(t)) found.column = from_pixel_to_pixel(t);
  return found;
}

// Options of a result that lies in memory as t does, channels-last or not.
at::TensorOptions like(const Tensor& t) { return t.options().memory_format(t.suggest_memory_format()); }

// Owns what a Problem points to.
struct Inputs {
  Tensor q, k, v, rel_row, rel_col;
  sasa::Problem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& rel_row_,
         const OptionalTensor& rel_col_, int64_t kernel_size, int64_t heads, bool zero_border)
      : Inputs(q_, rel_row_, rel_col_, kernel_size, heads, zero_border) {
    q = with_even_pixels(q_);
    k = with_even_pixels(k_);
    v = with_even_pixels(v_);
    problem.q = planes(q);
    problem.k = planes(k);
    problem.v = planes(v);
  }

  // All but q, k and v, which are of the shape and the dtype of `like`.
  Inputs(const Tensor& like, const OptionalTensor& rel_row_, const OptionalTensor& rel_col_, int64_t kernel_size,
         int64_t heads, bool zero_border) {
    problem.planes = like.size(0) * heads;
    problem.heads = heads;
    problem.channels = like.size(1) / heads;
    problem.height = like.size(2);
    problem.width = like.size(3);
    problem.kernel = kernel_size;
    problem.zero_border = zero_border;
    problem.scalar = scalar(like);
    if (rel_row_.has_value()) {
      problem.relative = true;
      rel_row = rel_row_->contiguous();
      rel_col = rel_col_->contiguous();
      problem.rel_row = rel_row.const_data_ptr();
      problem.rel_col = rel_col.const_data_ptr();
    }
  }
};

using Rows = void (*)(const sasa::Problem&, int64_t, int64_t, int64_t);

// One task per group of planes where the groups fill the threads, else bands of rows of each group: a band reads the
// rows around it once more, so there are no more of them than it takes.
int64_t bands_of(const sasa::Table& t, const sasa::Problem& p) {
  const int64_t groups = (p.planes + t.lanes - 1) / t.lanes, blocks = (p.height + t.rows - 1) / t.rows;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t bands = 1;
  if (groups % threads != 0 && groups < 4 * threads) {
    bands = (threads + groups - 1) / groups;
    while (groups * bands % threads != 0 && groups * bands < 4 * threads) ++bands;
    bands = std::min(bands, blocks);
  }
  return bands;
}

void run(const sasa::Table& t, Rows rows, const sasa::Problem& p) {
  const int64_t groups = (p.planes + t.lanes - 1) / t.lanes, blocks = (p.height + t.rows - 1) / t.rows;
  const int64_t bands = bands_of(t, p);
  sasa::parallel_for(groups * bands, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task % bands;
      rows(p, task / bands, blocks * band / bands * t.rows,
           std::min(p.height, blocks * (band + 1) / bands * t.rows));
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// The operators on the CPU

using Saved = std::tuple<Tensor, Tensor, Tensor>;  // y, top, sum

Saved forward_into(const Tensor& y, Inputs& in, bool save) {
  const sasa::Table& t = table();
  sasa::Problem& p = in.problem;
  Tensor top, sum;
  p.y = planes(y);
  if (save) {
    top = at::empty({y.size(0), p.heads, p.height, p.width}, y.options().dtype(at::kFloat));
    sum = at::empty_like(top);
    p.top = planes(top);
    p.sum = planes(sum);
  }
  if (p.planes) run(t, t.forward, p);
  return {y, top, sum};
}

Saved forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                  const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border, bool save) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  Inputs in(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
  return forward_into(at::empty(q.sizes(), like(q)), in, save);
}

Tensor attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                     const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  return std::get<0>(forward_cpu(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border, false));
}

Saved attention_saving_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                             int64_t kernel_size, int64_t heads, bool zero_border) {
  return forward_cpu(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border, true);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_backward(const Tensor& dy, const Tensor& q, const Tensor& y, const Tensor& top, const Tensor& sum, int64_t heads) {
  constexpr auto op = "fused_local_attention_backward: ";
  for (const auto& [t, name] : {std::pair{&dy, "dy"}, std::pair{&y, "y"}}) {
    TORCH_CHECK_VALUE(t->sym_sizes() == q.sym_sizes(), op, name, " must have q's shape ", q.sym_sizes(), ", got ",
                      t->sym_sizes(), "; pass the tensors of the forward pass");
    TORCH_CHECK_TYPE(t->scalar_type() == q.scalar_type(), op, name, " must have q's dtype ", q.scalar_type(), ", got ",
                     t->scalar_type(), "; convert it with .to(q.dtype)");
  }
  for (const auto& [t, name] : {std::pair{&top, "top"}, std::pair{&sum, "sum"}}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, op, name, " must be float32, got ", t->scalar_type(),
                     "; pass the one of fused_local_attention_forward");
    TORCH_CHECK_VALUE(t->dim() == 4 && t->sym_size(0) == q.sym_size(0) && t->sym_size(1) == heads &&
                          t->sym_size(2) == q.sym_size(2) && t->sym_size(3) == q.sym_size(3),
                      op, name, " must be [batch, heads, height, width], got ", t->sym_sizes(),
                      "; pass the one of fused_local_attention_forward");
  }
}

// Where q, k and v and their gradients are is in `in`; returns the gradients of the relative embedding.
std::tuple<Tensor, Tensor> backward_into(Inputs& in, const Tensor& dy_, const Tensor& y_, const Tensor& top_,
                                         const Tensor& sum_) {
  const sasa::Table& t = table();
  sasa::Problem& p = in.problem;
  const Tensor dy = with_even_pixels(dy_), y = with_even_pixels(y_);
  const Tensor top = with_even_pixels(top_), sum = with_even_pixels(sum_);
  const auto options = y.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor drel_row = at::empty({0}, options), drel_col = at::empty({0}, options), parts;
  p.y = planes(y);
  p.dy = planes(dy);
  p.top = planes(top);
  p.sum = planes(sum);
  if (p.relative) {
    drel_row = at::empty(in.rel_row.sizes(), options);
    drel_col = at::empty(in.rel_col.sizes(), options);
    p.drel_row = drel_row.data_ptr();
    p.drel_col = drel_col.data_ptr();
    const int64_t groups = (p.planes + t.lanes - 1) / t.lanes, blocks = (p.height + t.rows - 1) / t.rows;
    parts = at::empty({groups, blocks, p.kernel * p.channels, t.lanes}, y.options().dtype(at::kFloat));
    p.drel_parts = parts.data_ptr();
  }
  if (p.planes) run(t, t.backward, p);
  if (p.relative)
    sasa::parallel_for(p.heads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) t.reduce_relative(p, head);
    });
  return {drel_row, drel_col};
}

Gradients backward_cpu(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                       const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                       const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  check_backward(dy, q, y, top, sum, heads);
  Inputs in(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
  auto empty = [&] { return at::empty(q.sizes(), like(q)); };
  Tensor dq = empty(), dk = empty(), dv = empty();
  in.problem.dq = planes(dq);
  in.problem.dk = planes(dk);
  in.problem.dv = planes(dv);
  auto [drel_row, drel_col] = backward_into(in, dy, y, top, sum);
  return {dq, dk, dv, drel_row, drel_col};
}

// ---------------------------------------------------------------------------------------------------------------
// The whole layer: q, k and v are one product of the weights and x, [images, 3 * channels * H * W], laid out for the
// kernels where that pays: interleaved, which costs a copy of the weights and saves one of q, k and v.

using SavedLayer = std::tuple<Tensor, Tensor, Tensor, Tensor>;        // y, qkv, top, sum
using LayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dw_qkv, drel_row, drel_col

void check_layer_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& qkv, const Tensor& y,
                          const Tensor& top, const Tensor& sum, int64_t heads) {
  constexpr auto op = "fused_attention_layer_backward: ";
  check_backward(dy, y, y, top, sum, heads);
  TORCH_CHECK_VALUE(y.sym_size(0) == x.sym_size(0) && y.sym_size(1) * 3 == w.sym_size(0) &&
                        y.sym_size(2) == x.sym_size(2) && y.sym_size(3) == x.sym_size(3),
                    op, "y must be [", x.sym_size(0), ", ", w.sym_size(0) / 3, ", ", x.sym_size(2), ", ", x.sym_size(3),
                    "], got ", y.sym_sizes(), "; pass the tensors of the forward pass");
  TORCH_CHECK_VALUE(qkv.dim() == 2 && qkv.sym_size(0) == x.sym_size(0) &&
                        qkv.sym_size(1) == y.sym_size(1) * 3 * y.sym_size(2) * y.sym_size(3) &&
                        qkv.scalar_type() == x.scalar_type(),
                    op, "qkv must be the one of fused_attention_layer, got ", qkv.scalar_type(), " ", qkv.sym_sizes());
}

void check_layer(const Tensor& x, const Tensor& w) {
  constexpr auto op = "fused_attention_layer: ";
  TORCH_CHECK_VALUE(x.dim() == 4, op, "x must be [batch, channels, height, width], got ", x.dim(),
                    " dimensions; reshape it");
  TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) % 3 == 0 && w.sym_size(1) == x.sym_size(1), op,
                    "w_qkv must be [3 * output channels, ", x.sym_size(1), "], got ", w.sym_sizes(),
                    "; concatenate the weights of q, k and v along dimension 0");
  TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), op, "w_qkv must have x's dtype ", x.scalar_type(), ", got ",
                   w.scalar_type(), "; convert it with .to(x.dtype)");
  TORCH_CHECK_VALUE(w.device() == x.device(), op, "w_qkv must be on x's device ", x.device(), ", got ", w.device(),
                    "; move it with .to(x.device)");
}

Tensor empty_output(const Tensor& x, const Tensor& w) {
  return at::empty_symint({x.sym_size(0), w.sym_size(0) / 3, x.sym_size(2), x.sym_size(3)},
                          like(x));
}

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
void pack_images(const sasa::Planes& x, int64_t channels, int64_t pixels, int64_t from, int64_t count, const Tensor& packed) {
  const auto& t = products();
  const int64_t panels = packed.size(0), rows = packed.size(1);
  sasa::parallel_for(panels * count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / count, image = i % count, channel = panel * sasa::PANEL;
      t.pack_pixels(x, from + image, channel, std::min(sasa::PANEL, channels - channel), pixels,
                    words(packed) + (panel * rows + image * pixels) * sasa::PANEL);
    }
  });
}

// w_qkv as the right operand of the gradient of x: its rows by lane are what is summed over.
Tensor pack_backward(const Tensor& w_, int64_t heads) {
  const int64_t rows = w_.size(0), inputs = w_.size(1);
  const std::vector<int64_t> order = rows_by_lane(heads, rows / (3 * heads));
  const Tensor w = w_.index_select(0, at::tensor(order));
  sasa::Planes by_lane{w.data_ptr(), 0, 1, scalar(w)};
  by_lane.column = inputs;
  Tensor packed = at::empty(packed_sizes(w, inputs, rows), w.options());
  pack_images(by_lane, inputs, rows, 0, 1, packed);
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

Tensor spread(const Tensor& w, int64_t images) { return w.expand({images, w.size(0), w.size(1)}); }

// w: [3 * channels, inputs], or packed by pack_forward.
SavedLayer layer_forward(const Tensor& x, const Tensor& w, const Tensor& y, Inputs& in, bool save) {
  sasa::Problem& p = in.problem;
  const int64_t images = x.size(0), pixels = p.height * p.width, channels = y.size(1);
  if (w.dim() == 2) {
    const Tensor qkv = at::bmm(spread(w, images), x.contiguous().flatten(2));
    point(p, p.q, p.k, p.v, qkv, false);
    auto [same_y, top, sum] = forward_into(y, in, save);
    return {y, save ? qkv.reshape({images, 3 * channels * pixels}) : Tensor(), top, sum};
  }
  const Projection projection(x, w, channels);
  // Tasks project what they need, while it is in cache; bands would project the rows around them once more, and weights
  // that fill a cache are better read once for the whole batch.
  const int64_t bands = bands_of(table(), p), twice = (bands - 1) * (p.kernel - 1);
  // What is saved has the dtype of x, and is what the backward pass computes with.
  const bool parts_fit = save ? bands == 1 && p.scalar == sasa::Scalar::float32 : bands == 1 || twice * 8 <= p.height;
  const bool in_parts = parts_fit && w.nbytes() <= size_t(2 * LARGE);
  Tensor qkv;
  if (save || !in_parts) qkv = at::empty({images, 3 * channels * pixels}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (in_parts) {
    p.project = &Projection::rows;
    p.context = &projection;
  } else {
    projection.into(qkv);
  }
  point(p, p.q, p.k, p.v, qkv, true);
  auto [same_y, top, sum] = forward_into(y, in, save);
  return {y, save ? qkv : Tensor(), top, sum};
}

SavedLayer layer_forward(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                         int64_t kernel_size, int64_t heads, bool zero_border, bool save) {
  check_layer(x, w);
  const Tensor y = empty_output(x, w);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  Inputs in(y, rel_row, rel_col, kernel_size, heads, zero_border);
  return layer_forward(x, interleaves(heads) ? pack_forward(w, heads) : w, y, in, save);
}

// ---------------------------------------------------------------------------------------------------------------
// At inference: weights packed once, and what stands behind the layer applied as the result is stored

void check_weights(const Tensor& w, int64_t heads) {
  constexpr auto op = "fused_pack_weights: ";
  TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) > 0 && heads >= 1 && w.sym_size(0) % (3 * heads) == 0, op,
                    "w_qkv must be [3 * channels, input channels] with channels a multiple of heads, got ", w.sym_sizes(),
                    " and ", heads, " heads; stack the weights of q, k and v");
  TORCH_CHECK_TYPE(w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16, op,
                   "dtype must be float32 or bfloat16, got ", w.scalar_type(), "; convert w_qkv with .to()");
}

Tensor pack_cpu(const Tensor& w, int64_t heads) {
  check_weights(w, heads);
  return interleaves(heads) ? pack_forward(w, heads) : w.clone(at::MemoryFormat::Contiguous);
}

Tensor pack_meta(const Tensor& w, int64_t heads) {
  check_weights(w, heads);
  if (!interleaves(heads)) return at::empty_symint(w.sym_sizes(), w.options());
  const int64_t groups = heads / table().lanes;
  const auto [panels, rows, elements] =
      packed_sizes(w, w.sym_size(0).guard_int(__FILE__, __LINE__) / groups, w.sym_size(1).guard_int(__FILE__, __LINE__));
  return at::empty({groups, panels, rows, elements}, w.options());
}

Tensor empty_packed(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const c10::SymInt& channels,
                    int64_t heads) {
  constexpr auto op = "fused_attention_layer_packed: ";
  TORCH_CHECK_VALUE(x.dim() == 4, op, "x must be [batch, channels, height, width], got ", x.dim(), " dimensions; reshape it");
  TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), op, "w_packed must have x's dtype ", x.scalar_type(), ", got ",
                   w.scalar_type(), "; convert the weights, then pack them again");
  TORCH_CHECK_VALUE(heads >= 1 && channels >= heads && channels % heads == 0, op,
                    "heads must be at least 1 and divide the channels, got ", heads, " heads for ", channels, " channels");
  bool fits = w.dim() == 2 && w.sym_size(0) == 3 * channels && w.sym_size(1) == x.sym_size(1);
  if (interleaves(heads)) {
    const int64_t groups = heads / table().lanes;
    const auto [panels, rows, elements] =
        packed_sizes(w, 3 * channels.guard_int(__FILE__, __LINE__) / groups, x.sym_size(1).guard_int(__FILE__, __LINE__));
    fits = w.sym_sizes().equals({groups, panels, rows, elements});
  }
  TORCH_CHECK_VALUE(fits, op, "w_packed must come from fused_pack_weights for ", x.sym_size(1), " input channels, ", channels,
                    " channels, ", heads, " heads and the kernels in use, got ", w.sym_sizes(), "; pack the weights again");
  if (bias.has_value())
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == channels && bias->scalar_type() == at::kFloat, op,
                      "bias must be float32 [channels], got ", bias->sym_sizes(), " of ", bias->scalar_type());
  return at::empty_symint({x.sym_size(0), channels, x.sym_size(2), x.sym_size(3)}, like(x));
}

Tensor packed_layer_cpu(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                        const OptionalTensor& bias_, int64_t channels, int64_t kernel_size, int64_t heads, bool zero_border,
                        bool relu) {
  const Tensor y = empty_packed(x, w, bias_, channels, heads);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  Inputs in(y, rel_row, rel_col, kernel_size, heads, zero_border);
  const Tensor bias = bias_.has_value() ? bias_->contiguous() : Tensor();
  if (bias.defined()) in.problem.bias = bias.const_data_ptr<float>();
  in.problem.relu = relu;
  return std::get<0>(layer_forward(x, w.contiguous(), y, in, false));
}

Tensor packed_layer_meta(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                         const OptionalTensor& bias, c10::SymInt channels, int64_t kernel_size, int64_t heads, bool, bool) {
  Tensor y = empty_packed(x, w, bias, channels, heads);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  return y;
}

// ---------------------------------------------------------------------------------------------------------------
// The layer with its gradient

SavedLayer layer_saving_cpu(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                            const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  return layer_forward(x, w, rel_row, rel_col, kernel_size, heads, zero_border, true);
}

Tensor layer_cpu(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                 int64_t kernel_size, int64_t heads, bool zero_border) {
  return std::get<0>(layer_forward(x, w, rel_row, rel_col, kernel_size, heads, zero_border, false));
}

// dx = sum over rows of w_qkv of dqkv w_qkv; dqkv is interleaved, [images, H * W, 3 * channels].
Tensor input_gradient(const Tensor& dqkv, const Tensor& x, const Tensor& w, int64_t heads) {
  Tensor dx = at::empty(x.sizes(), like(x));
  const Tensor packed = pack_backward(w, heads);
  const sasa::Planes at = planes(dx);
  sasa::Product p;
  p.groups = x.size(0);
  p.rows = x.size(2) * x.size(3);
  p.depth = w.size(0);
  p.columns = x.size(1);
  p.a = dqkv.const_data_ptr();
  p.scalar = p.out_scalar = at.scalar;
  p.a_row = p.depth;
  p.a_group = p.rows * p.a_row;
  p.a_k = 1;
  p.b = words(packed);
  p.out = dx.data_ptr();
  p.out_group = at.image;
  p.out_row = at.column;
  p.out_column = at.channel;
  if (p.groups) multiply(p);
  return dx;
}

// dw_qkv[row][input] = sum over pixels of dqkv x, summed in float32, a few images of float32 at a time.
Tensor weight_gradient(const Tensor& dqkv, const Tensor& x_, const Tensor& w, int64_t heads) {
  const Tensor x = with_even_pixels(x_);
  const int64_t pixels = x.size(2) * x.size(3), inputs = x.size(1);
  const bool narrow = x.scalar_type() == at::kBFloat16;
  const int64_t together = narrow ? 1 : std::min(x.size(0), std::max<int64_t>(1, 512 / pixels));
  Tensor dw = at::empty(w.sizes(), w.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  if (!x.size(0)) return dw.zero_().to(w.scalar_type());
  const Tensor packed = at::empty(packed_sizes(w, inputs, together * pixels),
                                  w.options().memory_format(at::MemoryFormat::Contiguous));
  std::vector<int64_t> at = rows_by_lane(heads, w.size(0) / (3 * heads));
  for (int64_t& row : at) row *= inputs;
  sasa::Product p;
  p.rows = w.size(0);
  p.columns = inputs;
  p.scalar = scalar(x);
  p.a_row = 1;
  p.a_k = p.rows;
  p.b = words(packed);
  p.out = dw.data_ptr();
  p.out_at = at.data();
  for (int64_t image = 0; image < x.size(0); image += together) {
    const int64_t count = std::min(together, x.size(0) - image);
    const Tensor part = count == together ? packed : at::empty(packed_sizes(w, inputs, count * pixels), packed.options());
    pack_images(planes(x), inputs, pixels, image, count, part);
    p.b = words(part);
    p.depth = count * pixels;
    p.a = static_cast<const char*>(dqkv.const_data_ptr()) + image * pixels * p.rows * int64_t(dqkv.element_size());
    p.add = image > 0;
    multiply(p);
  }
  return dw.to(w.scalar_type());
}

LayerGradients layer_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                  const OptionalTensor& rel_col, const Tensor& qkv, const Tensor& y, const Tensor& top,
                                  const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  check_layer(x, w);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  check_layer_backward(dy, x, w, qkv, y, top, sum, heads);
  const bool interleaved = interleaves(heads);
  const Tensor saved = qkv.contiguous();
  const int64_t images = x.size(0), pixels = x.size(2) * x.size(3);
  const auto shape = interleaved ? std::array{images, pixels, w.size(0)} : std::array{images, w.size(0), pixels};
  Tensor dqkv = at::empty(shape, saved.options());
  Inputs in(y, rel_row, rel_col, kernel_size, heads, zero_border);
  sasa::Problem& p = in.problem;
  point(p, p.q, p.k, p.v, saved, interleaved);
  point(p, p.dq, p.dk, p.dv, dqkv, interleaved);
  auto [drel_row, drel_col] = backward_into(in, dy, y, top, sum);
  if (interleaved) {
    Tensor dw = weight_gradient(dqkv, x, w, heads);
    return {input_gradient(dqkv, x, w, heads), dw, drel_row, drel_col};
  }
  Tensor dx = at::bmm(spread(w.t(), images), dqkv).reshape(x.sizes()).contiguous(x.suggest_memory_format());
  Tensor dw = at::bmm(dqkv, x.contiguous().flatten(2).transpose(1, 2)).sum(0);
  return {dx, dw, drel_row, drel_col};
}

// ---------------------------------------------------------------------------------------------------------------
// Shapes only

Tensor attention_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                      const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  return at::empty_symint(q.sym_sizes(), like(q));
}

Saved attention_saving_meta(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                              int64_t kernel_size, int64_t heads, bool zero_border) {
  auto stat = [&] {
    return at::empty_symint({q.sym_size(0), heads, q.sym_size(2), q.sym_size(3)}, q.options().dtype(at::kFloat));
  };
  return {attention_meta(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border), stat(), stat()};
}

Gradients backward_meta(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                        const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads, bool) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  check_backward(dy, q, y, top, sum, heads);
  const auto options = q.options().memory_format(at::MemoryFormat::Contiguous);
  auto image = [&] { return at::empty_symint(q.sym_sizes(), like(q)); };
  auto embedding = [&](const OptionalTensor& t) {
    return t.has_value() ? at::empty_symint(t->sym_sizes(), options) : at::empty({0}, options);
  };
  return {image(), image(), image(), embedding(rel_row), embedding(rel_col)};
}

Tensor layer_meta(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                  int64_t kernel_size, int64_t heads, bool) {
  check_layer(x, w);
  Tensor y = empty_output(x, w);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  return y;
}

SavedLayer layer_saving_meta(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                      int64_t kernel_size, int64_t heads, bool zero_border) {
  check_layer(x, w);
  Tensor y = empty_output(x, w);
  auto [same_y, top, sum] = attention_saving_meta(y, y, y, rel_row, rel_col, kernel_size, heads, zero_border);
  Tensor qkv = at::empty_symint({x.sym_size(0), w.sym_size(0) * x.sym_size(2) * x.sym_size(3)}, x.options());
  return {y, qkv, top, sum};
}

LayerGradients layer_backward_meta(const Tensor& dy, const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                   const OptionalTensor& rel_col, const Tensor& qkv, const Tensor& y, const Tensor& top,
                                   const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  check_layer(x, w);
  check_layer_backward(dy, x, w, qkv, y, top, sum, heads);
  auto g = backward_meta(dy, y, y, y, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
  return {at::empty_symint(x.sym_sizes(), like(x)), at::empty_symint(w.sym_sizes(), w.options()), std::get<3>(g),
          std::get<4>(g)};
}

// ---------------------------------------------------------------------------------------------------------------
// Autograd

template <class F>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor call_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                      const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(attention_cpu)>("sasa_bench::fused_local_attention");
  return handle.call(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
}

Saved call_attention_saving(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                              int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(attention_saving_cpu)>("sasa_bench::fused_local_attention_forward");
  return handle.call(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
}

Gradients call_backward(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                        const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(backward_cpu)>("sasa_bench::fused_local_attention_backward");
  return handle.call(dy, q, k, v, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
}

Tensor call_layer(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                  int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(layer_cpu)>("sasa_bench::fused_attention_layer");
  return handle.call(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
}

SavedLayer call_layer_saving(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                             const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(layer_saving_cpu)>("sasa_bench::fused_attention_layer_forward");
  return handle.call(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
}

LayerGradients call_layer_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                   const OptionalTensor& rel_col, const Tensor& qkv, const Tensor& y, const Tensor& top,
                                   const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(layer_backward_cpu)>("sasa_bench::fused_attention_layer_backward");
  return handle.call(dy, x, w, rel_row, rel_col, qkv, y, top, sum, kernel_size, heads, zero_border);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& rel_row, const OptionalTensor& rel_col, int64_t kernel_size,
                               int64_t heads, bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, top, sum] = call_attention_saving(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
    ctx->save_for_backward({q, k, v, rel_row.value_or(Tensor()), rel_col.value_or(Tensor()), y, top, sum});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["zero_border"] = zero_border;
    ctx->mark_non_differentiable({top, sum});
    return {y, top, sum};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto [dq, dk, dv, drow, dcol] = call_backward(
        grads[0], saved[0], saved[1], saved[2], optional(saved[3]), optional(saved[4]), saved[5], saved[6], saved[7],
        ctx->saved_data["kernel_size"].toInt(), ctx->saved_data["heads"].toInt(),
        ctx->saved_data["zero_border"].toBool());
    const bool relative = saved[3].defined();
    return {dq, dk, dv, relative ? drow : Tensor(), relative ? dcol : Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(torch::autograd::AutogradContext*, const Tensor& dy, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                               const Tensor& y, const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads,
                               bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dq, dk, dv, drow, dcol] =
        call_backward(dy, q, k, v, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
    return {dq, dk, dv, drow, dcol};
  }
  static variable_list backward(torch::autograd::AutogradContext*, variable_list) { return refuse(); }

  static variable_list refuse() {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "fused_local_attention: the gradient of its gradient is not implemented; call "
                                "backward() without create_graph=True, or use another implementation for double "
                                "backward");
  }
};

struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& w,
                               const OptionalTensor& rel_row, const OptionalTensor& rel_col, int64_t kernel_size,
                               int64_t heads, bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, qkv, top, sum] = call_layer_saving(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
    ctx->save_for_backward({x, w, rel_row.value_or(Tensor()), rel_col.value_or(Tensor()), qkv, y, top, sum});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["zero_border"] = zero_border;
    ctx->mark_non_differentiable({qkv, top, sum});
    return {y, qkv, top, sum};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto s = ctx->get_saved_variables();
    auto [dx, dw, drow, dcol] =
        call_layer_backward(grads[0], s[0], s[1], optional(s[2]), optional(s[3]), s[4], s[5], s[6], s[7],
                            ctx->saved_data["kernel_size"].toInt(), ctx->saved_data["heads"].toInt(),
                            ctx->saved_data["zero_border"].toBool());
    const bool relative = s[2].defined();
    return {dx, dw, relative ? drow : Tensor(), relative ? dcol : Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct NoDoubleLayerBackward : torch::autograd::Function<NoDoubleLayerBackward> {
  static variable_list forward(torch::autograd::AutogradContext*, const Tensor& dy, const Tensor& x, const Tensor& w,
                               const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& qkv,
                               const Tensor& y, const Tensor& top, const Tensor& sum, int64_t kernel_size,
                               int64_t heads, bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dw, drow, dcol] =
        call_layer_backward(dy, x, w, rel_row, rel_col, qkv, y, top, sum, kernel_size, heads, zero_border);
    return {dx, dw, drow, dcol};
  }
  static variable_list backward(torch::autograd::AutogradContext*, variable_list) { return NoDoubleBackward::refuse(); }
};

constexpr auto NO_TRANSFORMS =
    "torch.func and forward-mode derivatives do not go through fused_local_attention: use another implementation of "
    "local attention, such as unfold";

// Whether a gradient is to be recorded. Refuses what torch would answer with no tangent at all, or in other words.
bool differentiable(std::initializer_list<OptionalTensor> tensors) {
  const auto any = [&](auto holds) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [&](const OptionalTensor& t) { return t.has_value() && t->defined() && holds(*t); });
  };
  TORCH_CHECK_NOT_IMPLEMENTED(!any([](const Tensor& t) { return t._fw_grad(0).defined(); }), NO_TRANSFORMS);
  if (!at::GradMode::is_enabled() || !any([](const Tensor& t) { return t.requires_grad(); })) return false;
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    try {
      functorch->checkSupportsCppAutogradFunction();
    } catch (const c10::Error&) {
      TORCH_CHECK_NOT_IMPLEMENTED(false, NO_TRANSFORMS);
    }
  }
  return true;
}

Tensor attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                          const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({q, k, v, rel_row, rel_col}))
    return AttentionFunction::apply(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)[0];
  at::AutoDispatchBelowADInplaceOrView below;
  return call_attention(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
}

Saved attention_saving_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                                  int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({q, k, v, rel_row, rel_col})) {
    auto out = AttentionFunction::apply(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_attention_saving(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
}

Gradients backward_autograd(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                            const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                            const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({dy, q, k, v, rel_row, rel_col, y, top, sum})) {
    auto g = NoDoubleBackward::apply(dy, q, k, v, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
    return {g[0], g[1], g[2], g[3], g[4]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(dy, q, k, v, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
}

Tensor layer_autograd(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                      int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({x, w, rel_row, rel_col}))
    return LayerFunction::apply(x, w, rel_row, rel_col, kernel_size, heads, zero_border)[0];
  at::AutoDispatchBelowADInplaceOrView below;
  return call_layer(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
}

SavedLayer layer_saving_autograd(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                 const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({x, w, rel_row, rel_col})) {
    auto out = LayerFunction::apply(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_layer_saving(x, w, rel_row, rel_col, kernel_size, heads, zero_border);
}

LayerGradients layer_backward_autograd(const Tensor& dy, const Tensor& x, const Tensor& w,
                                       const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& qkv,
                                       const Tensor& y, const Tensor& top, const Tensor& sum, int64_t kernel_size,
                                       int64_t heads, bool zero_border) {
  if (differentiable({dy, x, w, rel_row, rel_col, qkv, y, top, sum})) {
    auto g = NoDoubleLayerBackward::apply(dy, x, w, rel_row, rel_col, qkv, y, top, sum, kernel_size, heads, zero_border);
    return {g[0], g[1], g[2], g[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_layer_backward(dy, x, w, rel_row, rel_col, qkv, y, top, sum, kernel_size, heads, zero_border);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_bench, m) {
  m.def("fused_use_kernels(str path, str products) -> bool", &use_kernels);
  m.def(
      "fused_local_attention(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, int kernel_size, "
      "int heads, bool zero_border) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def(
      "fused_local_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
      "int kernel_size, int heads, bool zero_border) -> (Tensor y, Tensor top, Tensor sum)",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def(
      "fused_local_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
      "Tensor y, Tensor top, Tensor sum, int kernel_size, int heads, bool zero_border) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor drel_row, Tensor drel_col)",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def(
      "fused_attention_layer(Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, int kernel_size, int heads, "
      "bool zero_border) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def("fused_pack_weights(Tensor w_qkv, int heads) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_attention_layer_packed(Tensor x, Tensor w_packed, Tensor? rel_row, Tensor? rel_col, Tensor? bias, "
      "SymInt channels, int kernel_size, int heads, bool zero_border, bool relu) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def(
      "fused_attention_layer_forward(Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, int kernel_size, "
      "int heads, bool zero_border) -> (Tensor y, Tensor qkv, Tensor top, Tensor sum)",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  m.def(
      "fused_attention_layer_backward(Tensor dy, Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, Tensor qkv, "
      "Tensor y, Tensor top, Tensor sum, int kernel_size, int heads, bool zero_border) -> (Tensor dx, Tensor dw_qkv, "
      "Tensor drel_row, Tensor drel_col)",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
}

TORCH_LIBRARY_IMPL(sasa_bench, CPU, m) {
  m.impl("fused_pack_weights", &pack_cpu);
  m.impl("fused_attention_layer_packed", &packed_layer_cpu);
  m.impl("fused_attention_layer", &layer_cpu);
  m.impl("fused_attention_layer_forward", &layer_saving_cpu);
  m.impl("fused_attention_layer_backward", &layer_backward_cpu);
  m.impl("fused_local_attention", &attention_cpu);
  m.impl("fused_local_attention_forward", &attention_saving_cpu);
  m.impl("fused_local_attention_backward", &backward_cpu);
}

TORCH_LIBRARY_IMPL(sasa_bench, Meta, m) {
  m.impl("fused_pack_weights", &pack_meta);
  m.impl("fused_attention_layer_packed", &packed_layer_meta);
  m.impl("fused_attention_layer", &layer_meta);
  m.impl("fused_attention_layer_forward", &layer_saving_meta);
  m.impl("fused_attention_layer_backward", &layer_backward_meta);
  m.impl("fused_local_attention", &attention_meta);
  m.impl("fused_local_attention_forward", &attention_saving_meta);
  m.impl("fused_local_attention_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(sasa_bench, Autograd, m) {
  m.impl("fused_attention_layer", &layer_autograd);
  m.impl("fused_attention_layer_forward", &layer_saving_autograd);
  m.impl("fused_attention_layer_backward", &layer_backward_autograd);
  m.impl("fused_local_attention", &attention_autograd);
  m.impl("fused_local_attention_forward", &attention_saving_autograd);
  m.impl("fused_local_attention_backward", &backward_autograd);
}
