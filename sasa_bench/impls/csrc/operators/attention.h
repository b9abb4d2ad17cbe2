// The operators of the attention alone, q, k, v -> y, and their shapes.
#pragma once

#include <tuple>
#include <utility>

#include "../parallel.h"
#include "arguments.h"

namespace {

using OfBand = void (*)(const sasa::Problem&, const sasa::Band&);

sasa::Tasks tasks(const sasa::Table& t, const sasa::Problem& p, bool free = false) {
  return {p, t.lanes, t.rows, at::in_parallel_region() ? 1 : at::get_num_threads(), free};
}

void run(const sasa::Table& t, OfBand work, const sasa::Problem& p, bool free = false) {
  const sasa::Tasks all = tasks(t, p, free);
  sasa::parallel_for(all.count(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) all.run(task, work);
  });
}

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
  if (p.planes) run(t, t.forward, p, sasa::keys_in_place(p));
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
  const sasa::Table& kernels = *backward_kernels.load();
  if (p.planes) run(kernels, kernels.backward, p);
  if (p.relative)
    sasa::parallel_for(p.heads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) kernels.reduce_relative(p, head);
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

}  // namespace
