// The torch operators over the kernels of local_attention.h. The kernels themselves live in libraries of their own,
// one per instruction set, so that this file is compiled once and for the least capable processor.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/autograd.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_table.h"

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
      : q(with_contiguous_planes(q_)), k(with_contiguous_planes(k_)), v(with_contiguous_planes(v_)) {
    problem.planes = q.size(0) * heads;
    problem.heads = heads;
    problem.channels = q.size(1) / heads;
    problem.height = q.size(2);
    problem.width = q.size(3);
    problem.kernel = kernel_size;
    problem.zero_border = zero_border;
    problem.scalar = scalar(q);
    problem.q = planes(q);
    problem.k = planes(k);
    problem.v = planes(v);
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
void run(const sasa::Table& t, Rows rows, const sasa::Problem& p) {
  const int64_t groups = (p.planes + t.lanes - 1) / t.lanes, blocks = (p.height + t.rows - 1) / t.rows;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t bands = 1;
  if (groups % threads != 0 && groups < 4 * threads) {
    bands = (threads + groups - 1) / groups;
    while (groups * bands % threads != 0 && groups * bands < 4 * threads) ++bands;
    bands = std::min(bands, blocks);
  }
  at::parallel_for(0, groups * bands, 1, [&](int64_t begin, int64_t end) {
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

Saved forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
                                       const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads,
                                       bool zero_border, bool save) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  const sasa::Table& t = table();
  Inputs in(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
  Tensor y = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor top, sum;
  in.problem.y = planes(y);
  if (save) {
    top = at::empty({q.size(0), heads, q.size(2), q.size(3)}, q.options().dtype(at::kFloat));
    sum = at::empty_like(top);
    in.problem.top = planes(top);
    in.problem.sum = planes(sum);
  }
  if (in.problem.planes) run(t, t.forward, in.problem);
  return {y, top, sum};
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

// dq, dk and dv are given, with contiguous planes; returns the gradients of the relative embedding.
std::tuple<Tensor, Tensor> backward_into(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dy_,
                                         const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                         const Tensor& y_, const Tensor& top_, const Tensor& sum_, int64_t kernel_size,
                                         int64_t heads, bool zero_border) {
  check(q, k, v, rel_row, rel_col, kernel_size, heads);
  check_backward(dy_, q, y_, top_, sum_, heads);
  const sasa::Table& t = table();
  Inputs in(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
  sasa::Problem& p = in.problem;
  const Tensor dy = with_contiguous_planes(dy_), y = with_contiguous_planes(y_);
  const Tensor top = with_contiguous_planes(top_), sum = with_contiguous_planes(sum_);
  const auto options = q.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor drel_row = at::empty({0}, options), drel_col = at::empty({0}, options), parts;
  p.y = planes(y);
  p.dy = planes(dy);
  p.top = planes(top);
  p.sum = planes(sum);
  p.dq = planes(dq);
  p.dk = planes(dk);
  p.dv = planes(dv);
  if (p.relative) {
    drel_row = at::empty(rel_row->sizes(), options);
    drel_col = at::empty(rel_col->sizes(), options);
    p.drel_row = drel_row.data_ptr();
    p.drel_col = drel_col.data_ptr();
    const int64_t groups = (p.planes + t.lanes - 1) / t.lanes, blocks = (p.height + t.rows - 1) / t.rows;
    parts = at::empty({groups, blocks, p.kernel * p.channels, t.lanes}, q.options().dtype(at::kFloat));
    p.drel_parts = parts.data_ptr();
  }
  if (p.planes) run(t, t.backward, p);
  if (p.relative)
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) t.reduce_relative(p, head);
    });
  return {drel_row, drel_col};
}

Gradients backward_cpu(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                       const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                       const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  auto empty = [&] { return at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous)); };
  Tensor dq = empty(), dk = empty(), dv = empty();
  auto [drel_row, drel_col] = backward_into(dq, dk, dv, dy, q, k, v, rel_row, rel_col, y, top, sum, kernel_size, heads,
                                            zero_border);
  return {dq, dk, dv, drel_row, drel_col};
}

// The same for q, k and v that are the thirds of one tensor, whose gradient is then one tensor too: taken apart and
// put together by autograd it would be copied.
void check_packed(const Tensor& qkv) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.sym_size(1) % 3 == 0,
                    "fused_packed_attention: qkv must be [batch, 3 * channels, height, width], got ", qkv.sym_sizes(),
                    "; concatenate q, k and v along dimension 1");
}

std::vector<Tensor> thirds(const Tensor& qkv) {
  check_packed(qkv);
  auto n = qkv.sym_size(1) / 3;
  return {qkv.narrow_symint(1, 0, n), qkv.narrow_symint(1, n, n), qkv.narrow_symint(1, n * 2, n)};
}

Saved packed_cpu(const Tensor& qkv, const OptionalTensor& rel_row, const OptionalTensor& rel_col, int64_t kernel_size,
                 int64_t heads, bool zero_border) {
  auto t = thirds(qkv);
  return forward_cpu(t[0], t[1], t[2], rel_row, rel_col, kernel_size, heads, zero_border, true);
}

std::tuple<Tensor, Tensor, Tensor> packed_backward_cpu(const Tensor& dy, const Tensor& qkv,
                                                       const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                                       const Tensor& y, const Tensor& top, const Tensor& sum,
                                                       int64_t kernel_size, int64_t heads, bool zero_border) {
  Tensor dqkv = at::empty(qkv.sizes(), qkv.options().memory_format(at::MemoryFormat::Contiguous));
  auto t = thirds(qkv), g = thirds(dqkv);
  auto [drel_row, drel_col] = backward_into(g[0], g[1], g[2], dy, t[0], t[1], t[2], rel_row, rel_col, y, top, sum,
                                            kernel_size, heads, zero_border);
  return {dqkv, drel_row, drel_col};
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

Saved packed_meta(const Tensor& qkv, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                  int64_t kernel_size, int64_t heads, bool zero_border) {
  auto t = thirds(qkv);
  return attention_saving_meta(t[0], t[1], t[2], rel_row, rel_col, kernel_size, heads, zero_border);
}

std::tuple<Tensor, Tensor, Tensor> packed_backward_meta(const Tensor& dy, const Tensor& qkv,
                                                        const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                                        const Tensor& y, const Tensor& top, const Tensor& sum,
                                                        int64_t kernel_size, int64_t heads, bool zero_border) {
  auto t = thirds(qkv);
  auto g = backward_meta(dy, t[0], t[1], t[2], rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
  return {at::empty_symint(qkv.sym_sizes(), qkv.options().memory_format(at::MemoryFormat::Contiguous)),
          std::get<3>(g), std::get<4>(g)};
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

Saved call_packed(const Tensor& qkv, const OptionalTensor& rel_row, const OptionalTensor& rel_col, int64_t kernel_size,
                  int64_t heads, bool zero_border) {
  static auto handle = op<decltype(packed_cpu)>("sasa_bench::fused_packed_attention");
  return handle.call(qkv, rel_row, rel_col, kernel_size, heads, zero_border);
}

std::tuple<Tensor, Tensor, Tensor> call_packed_backward(const Tensor& dy, const Tensor& qkv,
                                                        const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                                        const Tensor& y, const Tensor& top, const Tensor& sum,
                                                        int64_t kernel_size, int64_t heads, bool zero_border) {
  static auto handle = op<decltype(packed_backward_cpu)>("sasa_bench::fused_packed_attention_backward");
  return handle.call(dy, qkv, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
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

struct PackedFunction : torch::autograd::Function<PackedFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& qkv, const OptionalTensor& rel_row,
                               const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads, bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, top, sum] = call_packed(qkv, rel_row, rel_col, kernel_size, heads, zero_border);
    ctx->save_for_backward({qkv, rel_row.value_or(Tensor()), rel_col.value_or(Tensor()), y, top, sum});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["zero_border"] = zero_border;
    ctx->mark_non_differentiable({top, sum});
    return {y, top, sum};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto s = ctx->get_saved_variables();
    auto [dqkv, drow, dcol] =
        call_packed_backward(grads[0], s[0], optional(s[1]), optional(s[2]), s[3], s[4], s[5],
                             ctx->saved_data["kernel_size"].toInt(), ctx->saved_data["heads"].toInt(),
                             ctx->saved_data["zero_border"].toBool());
    const bool relative = s[1].defined();
    return {dqkv, relative ? drow : Tensor(), relative ? dcol : Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct NoDoublePackedBackward : torch::autograd::Function<NoDoublePackedBackward> {
  static variable_list forward(torch::autograd::AutogradContext*, const Tensor& dy, const Tensor& qkv,
                               const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& y,
                               const Tensor& top, const Tensor& sum, int64_t kernel_size, int64_t heads,
                               bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dqkv, drow, dcol] =
        call_packed_backward(dy, qkv, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
    return {dqkv, drow, dcol};
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

Saved packed_autograd(const Tensor& qkv, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                      int64_t kernel_size, int64_t heads, bool zero_border) {
  if (differentiable({qkv, rel_row, rel_col})) {
    auto out = PackedFunction::apply(qkv, rel_row, rel_col, kernel_size, heads, zero_border);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_packed(qkv, rel_row, rel_col, kernel_size, heads, zero_border);
}

std::tuple<Tensor, Tensor, Tensor> packed_backward_autograd(const Tensor& dy, const Tensor& qkv,
                                                            const OptionalTensor& rel_row,
                                                            const OptionalTensor& rel_col, const Tensor& y,
                                                            const Tensor& top, const Tensor& sum, int64_t kernel_size,
                                                            int64_t heads, bool zero_border) {
  if (differentiable({dy, qkv, rel_row, rel_col, y, top, sum})) {
    auto g = NoDoublePackedBackward::apply(dy, qkv, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
    return {g[0], g[1], g[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_packed_backward(dy, qkv, rel_row, rel_col, y, top, sum, kernel_size, heads, zero_border);
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
      "fused_packed_attention(Tensor qkv, Tensor? rel_row, Tensor? rel_col, int kernel_size, int heads, "
      "bool zero_border) -> (Tensor y, Tensor top, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_packed_attention_backward(Tensor dy, Tensor qkv, Tensor? rel_row, Tensor? rel_col, Tensor y, Tensor top, "
      "Tensor sum, int kernel_size, int heads, bool zero_border) -> (Tensor dqkv, Tensor drel_row, Tensor drel_col)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sasa_bench, CPU, m) {
  m.impl("fused_packed_attention", &packed_cpu);
  m.impl("fused_packed_attention_backward", &packed_backward_cpu);
  m.impl("fused_local_attention", &attention_cpu);
  m.impl("fused_local_attention_forward", &attention_saving_cpu);
  m.impl("fused_local_attention_backward", &backward_cpu);
}

TORCH_LIBRARY_IMPL(sasa_bench, Meta, m) {
  m.impl("fused_packed_attention", &packed_meta);
  m.impl("fused_packed_attention_backward", &packed_backward_meta);
  m.impl("fused_local_attention", &attention_meta);
  m.impl("fused_local_attention_forward", &attention_saving_meta);
  m.impl("fused_local_attention_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(sasa_bench, Autograd, m) {
  m.impl("fused_packed_attention", &packed_autograd);
  m.impl("fused_packed_attention_backward", &packed_backward_autograd);
  m.impl("fused_local_attention", &attention_autograd);
  m.impl("fused_local_attention_forward", &attention_saving_autograd);
  m.impl("fused_local_attention_backward", &backward_autograd);
}
