// The torch operators over the kernels of local_attention.h. The kernels themselves live in libraries of their own,
// one per instruction set, so that this file is compiled once and for the least capable processor.
#include <ATen/ATen.h>
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

void use_kernels(c10::string_view path) {
  const std::string name(path);
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "fused_local_attention: cannot load the kernels from ", name, ": ", dlerror());
  auto get = reinterpret_cast<const sasa::Table* (*)()>(dlsym(library, "sasa_kernel_table"));
  TORCH_CHECK(get && get()->version == sasa::TABLE_VERSION, "fused_local_attention: ", name,
              " is not a build of this version's kernels; delete it and load again");
  kernels = get();
}

const sasa::Table& table() {
  const sasa::Table* t = kernels;
  TORCH_CHECK(t, "fused_local_attention: no kernels are loaded; call sasa_bench.impls.fused.load() first");
  return *t;
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

// The kernels walk rows of contiguous pixels; images and channels may have any stride.
Tensor with_contiguous_planes(const Tensor& t) {
  const bool rows = (t.stride(3) == 1 || t.size(3) == 1) && (t.stride(2) == t.size(3) || t.size(2) == 1);
  return rows ? t : t.contiguous();
}

sasa::Scalar scalar(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16 ? sasa::Scalar::bfloat16 : sasa::Scalar::float32;
}

sasa::Planes planes(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), scalar(t)};
}

// Owns what a Problem points to.
struct Inputs {
  Tensor q, k, v, rel_row, rel_col;
  sasa::Problem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& rel_row_,
         const OptionalTensor& rel_col_, int64_t kernel_size, int64_t heads, bool zero_border)
      : Inputs(q_, rel_row_, rel_col_, kernel_size, heads, zero_border) {
    q = with_contiguous_planes(q_);
    k = with_contiguous_planes(k_);
    v = with_contiguous_planes(v_);
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
  return forward_into(at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous)), in, save);
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
  const Tensor dy = with_contiguous_planes(dy_), y = with_contiguous_planes(y_);
  const Tensor top = with_contiguous_planes(top_), sum = with_contiguous_planes(sum_);
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
  auto empty = [&] { return at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous)); };
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
                          x.options().memory_format(at::MemoryFormat::Contiguous));
}

bool interleaves(const Tensor& x, int64_t heads) {
  return x.scalar_type() == at::kFloat && heads % table().lanes == 0 &&
         x.size(2) * x.size(3) >= 2 * x.size(1);
}

// The weights' rows from [q, k, v][head][channel] to [group of heads][q, k, v][channel][head], and back.
Tensor by_lane(const Tensor& w, int64_t heads) {
  const int64_t lanes = table().lanes, d = w.size(0) / (3 * heads);
  return w.reshape({3, heads / lanes, lanes, d, w.size(1)}).permute({1, 0, 3, 2, 4}).reshape(w.sizes());
}

Tensor by_head(const Tensor& w, int64_t heads) {
  const int64_t lanes = table().lanes, d = w.size(0) / (3 * heads);
  return w.reshape({heads / lanes, 3, d, lanes, w.size(1)}).permute({1, 0, 3, 2, 4}).reshape(w.sizes());
}

Tensor spread(const Tensor& w, int64_t images) { return w.expand({images, w.size(0), w.size(1)}); }

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

// What a task needs to project rows of its group itself.
struct Projection {
  Tensor x, w;  // [images, input channels, H * W], by lane [3 * channels, input channels]
  int64_t groups, width;  // groups of heads of one image

  static void rows(const void* context, int64_t group, int64_t from, int64_t to, float* out, int64_t pixel) {
    const auto& self = *static_cast<const Projection*>(context);
    const int64_t c = self.x.size(1), pixels = self.x.size(2), n = self.w.size(0) / self.groups;
    const int64_t image = group / self.groups, count = (to - from) * self.width;
    const at::InferenceMode no_graph;
    auto view = [&](const float* data, at::IntArrayRef sizes, at::IntArrayRef strides) {
      return at::from_blob(const_cast<float*>(data), sizes, strides, self.x.options());
    };
    const Tensor x = view(self.x.const_data_ptr<float>() + image * c * pixels + from * self.width, {count, c}, {1, pixels});
    const Tensor w = view(self.w.const_data_ptr<float>() + group % self.groups * n * c, {c, n}, {1, c});
    Tensor y = view(out, {count, n}, {pixel, 1});
    at::mm_out(y, x, w);
  }
};

SavedLayer layer_forward(const Tensor& x_, const Tensor& w_, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                         int64_t kernel_size, int64_t heads, bool zero_border, bool save) {
  check_layer(x_, w_);
  Tensor y = empty_output(x_, w_), qkv;
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  Inputs in(y, rel_row, rel_col, kernel_size, heads, zero_border);
  sasa::Problem& p = in.problem;
  const Tensor x = x_.contiguous().flatten(2);
  const int64_t images = x.size(0), pixels = x.size(2);
  const bool interleaved = interleaves(x_, heads);
  const Tensor w = interleaved ? by_lane(w_, heads) : w_.contiguous();
  // Tasks project what they need, while it is in cache; bands would project the rows around them once more.
  const int64_t bands = bands_of(table(), p), twice = (bands - 1) * (kernel_size - 1);
  const bool in_parts = interleaved && (bands == 1 || (!save && twice * 8 <= p.height));
  const Projection projection{x, w, heads / table().lanes, p.width};
  if (in_parts) {
    if (save) qkv = at::empty({images, pixels, w.size(0)}, x.options());
    p.project = &Projection::rows;
    p.context = &projection;
  } else {
    qkv = interleaved ? at::bmm(x.transpose(1, 2), spread(w, images).transpose(1, 2)) : at::bmm(spread(w, images), x);
  }
  point(p, p.q, p.k, p.v, qkv, interleaved);
  auto [same_y, top, sum] = forward_into(y, in, save);
  return {y, save ? qkv.reshape({images, w.size(0) * pixels}) : Tensor(), top, sum};
}

SavedLayer layer_saving_cpu(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                            const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
  return layer_forward(x, w, rel_row, rel_col, kernel_size, heads, zero_border, true);
}

Tensor layer_cpu(const Tensor& x, const Tensor& w, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                 int64_t kernel_size, int64_t heads, bool zero_border) {
  return std::get<0>(layer_forward(x, w, rel_row, rel_col, kernel_size, heads, zero_border, false));
}

LayerGradients layer_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                  const OptionalTensor& rel_col, const Tensor& qkv, const Tensor& y, const Tensor& top,
                                  const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  check_layer(x, w);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  check_layer_backward(dy, x, w, qkv, y, top, sum, heads);
  const bool interleaved = interleaves(x, heads);
  const Tensor image = x.contiguous().flatten(2), saved = qkv.contiguous();
  const int64_t images = image.size(0), pixels = image.size(2);
  const auto shape = interleaved ? std::array{images, pixels, w.size(0)} : std::array{images, w.size(0), pixels};
  Tensor dqkv = at::empty(shape, saved.options());
  Inputs in(y, rel_row, rel_col, kernel_size, heads, zero_border);
  sasa::Problem& p = in.problem;
  point(p, p.q, p.k, p.v, saved, interleaved);
  point(p, p.dq, p.dk, p.dv, dqkv, interleaved);
  auto [drel_row, drel_col] = backward_into(in, dy, y, top, sum);
  if (interleaved) dqkv = dqkv.transpose(1, 2);
  const Tensor used = interleaved ? by_lane(w, heads) : w;
  Tensor dx = at::bmm(spread(used.t(), images), dqkv).reshape(x.sizes());
  Tensor dw = at::bmm(dqkv, image.transpose(1, 2)).sum(0);
  return {dx, interleaved ? by_head(dw, heads) : dw, drel_row, drel_col};
}

// ---------------------------------------------------------------------------------------------------------------
// Shapes only

Tensor attention_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                      const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  return at::empty_symint(q.sym_sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
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
  auto like = [&](const Tensor& t) { return at::empty_symint(t.sym_sizes(), options); };
  auto like_optional = [&](const OptionalTensor& t) { return t.has_value() ? like(*t) : at::empty({0}, options); };
  return {like(q), like(q), like(q), like_optional(rel_row), like_optional(rel_col)};
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
  auto like = [&](const Tensor& t) {
    return at::empty_symint(t.sym_sizes(), t.options().memory_format(at::MemoryFormat::Contiguous));
  };
  return {like(x), like(w), std::get<3>(g), std::get<4>(g)};
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

bool differentiable(std::initializer_list<OptionalTensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const OptionalTensor& t) { return t.has_value() && t->defined() && t->requires_grad(); });
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
  m.def("fused_use_kernels(str path) -> ()", &use_kernels);
  m.def(
      "fused_local_attention(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, int kernel_size, "
      "int heads, bool zero_border) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_local_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
      "int kernel_size, int heads, bool zero_border) -> (Tensor y, Tensor top, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_local_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
      "Tensor y, Tensor top, Tensor sum, int kernel_size, int heads, bool zero_border) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor drel_row, Tensor drel_col)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_attention_layer(Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, int kernel_size, int heads, "
      "bool zero_border) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_attention_layer_forward(Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, int kernel_size, "
      "int heads, bool zero_border) -> (Tensor y, Tensor qkv, Tensor top, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_attention_layer_backward(Tensor dy, Tensor x, Tensor w_qkv, Tensor? rel_row, Tensor? rel_col, Tensor qkv, "
      "Tensor y, Tensor top, Tensor sum, int kernel_size, int heads, bool zero_border) -> (Tensor dx, Tensor dw_qkv, "
      "Tensor drel_row, Tensor drel_col)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sasa_bench, CPU, m) {
  m.impl("fused_attention_layer", &layer_cpu);
  m.impl("fused_attention_layer_forward", &layer_saving_cpu);
  m.impl("fused_attention_layer_backward", &layer_backward_cpu);
  m.impl("fused_local_attention", &attention_cpu);
  m.impl("fused_local_attention_forward", &attention_saving_cpu);
  m.impl("fused_local_attention_backward", &backward_cpu);
}

TORCH_LIBRARY_IMPL(sasa_bench, Meta, m) {
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
