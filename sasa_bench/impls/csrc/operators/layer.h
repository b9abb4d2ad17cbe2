// The whole layer, x -> y: forward, at inference with weights packed once, and backward. q, k and v are one product of the
// weights and x, [images, 3 * channels * H * W], interleaved where heads fill the lanes.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "projection.h"

namespace {

using SavedLayer = std::tuple<Tensor, Tensor, Tensor, Tensor>;        // y, qkv, top, sum
using LayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dw_qkv, drel_row, drel_col

void check_layer_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& qkv, const Tensor& y,
                          const Tensor& top, const Tensor& sum, int64_t heads) {
  constexpr auto op = "fused_attention_layer_backward: ";
  check_backward(dy, y, y, top, sum, heads);
  TORCH_CHECK_TYPE(y.scalar_type() == x.scalar_type(), op, "y must have x's dtype ", x.scalar_type(), ", got ",
                   y.scalar_type(), "; pass the tensors of the forward pass");
  TORCH_CHECK_VALUE(y.sym_size(0) == x.sym_size(0) && y.sym_size(1) * 3 == w.sym_size(0) &&
                        y.sym_size(2) == x.sym_size(2) && y.sym_size(3) == x.sym_size(3),
                    op, "y must be [", x.sym_size(0), ", ", w.sym_size(0) / 3, ", ", x.sym_size(2), ", ", x.sym_size(3),
                    "], got ", y.sym_sizes(), "; pass the tensors of the forward pass");
  TORCH_CHECK_VALUE(qkv.dim() == 2 && qkv.sym_size(0) == x.sym_size(0) &&
                        qkv.sym_size(1) == y.sym_size(1) * 3 * y.sym_size(2) * y.sym_size(3) &&
                        qkv.scalar_type() == x.scalar_type(),
                    op, "qkv must be [", x.sym_size(0), ", ", y.sym_size(1) * 3 * y.sym_size(2) * y.sym_size(3), "] in x's dtype ",
                    x.scalar_type(), ", got ", qkv.sym_sizes(), " in ", qkv.scalar_type(),
                    "; pass what fused_attention_layer_forward returned");
}

void check_layer(const Tensor& x, const Tensor& w) {
  constexpr auto op = "fused_attention_layer: ";
  TORCH_CHECK_VALUE(x.dim() == 4, op, "x must be [batch, channels, height, width], got ", x.dim(),
                    " dimensions; reshape it");
  TORCH_CHECK_VALUE(x.sym_size(1) > 0, op, "x must have a channel or more, got ", x.sym_sizes());
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

Tensor spread(const Tensor& w, int64_t images) { return w.expand({images, w.size(0), w.size(1)}); }

// w: [3 * channels, inputs], or packed by pack_forward.
SavedLayer layer_forward(const Tensor& x, const Tensor& w, const Tensor& y, Inputs& in, bool save) {
  sasa::Problem& p = in.problem;
  const int64_t images = x.size(0), pixels = p.height * p.width, channels = y.size(1);
  // The product has to have the dtype of x, whatever autocast would make of it.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (w.dim() == 2) {
    const Tensor qkv = at::bmm(spread(w, images), x.contiguous().flatten(2));
    point(p, p.q, p.k, p.v, qkv, false);
    auto [same_y, top, sum] = forward_into(y, in, save);
    return {y, save ? qkv.reshape({images, 3 * channels * pixels}) : Tensor(), top, sum};
  }
  const Tensor even = with_even_pixels(x);
  const sasa::Projection projection = projection_of(even, w, channels);
  const int64_t bands = tasks(table(), p).bands;
  // What is saved has the dtype of x, and is what the backward pass computes with.
  const bool in_parts = sasa::in_parts(p, bands, int64_t(w.nbytes())) &&
                        (!save || (bands == 1 && p.scalar == sasa::Scalar::float32));
  Tensor qkv;
  if (save || !in_parts) qkv = at::empty({images, 3 * channels * pixels}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (in_parts) {
    p.project = &sasa::Projection::rows;
    p.context = &projection;
  } else {
    project_into(projection, qkv);
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

void check_weights(const Tensor& w, int64_t heads) {
  constexpr auto op = "fused_pack_weights: ";
  TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) > 0 && w.sym_size(1) > 0 && heads >= 1 && w.sym_size(0) % (3 * heads) == 0, op,
                    "w_qkv must be [3 * channels, input channels] with channels a multiple of heads, got ", w.sym_sizes(),
                    " and ", heads, " heads; stack the weights of q, k and v");
  TORCH_CHECK_TYPE(computable(w), op, "dtype must be float32, bfloat16 or float16, got ", w.scalar_type(),
                   "; convert w_qkv with .to()");
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
                      "bias must be float32 [", channels, "], got ", bias->sym_sizes(), " of ", bias->scalar_type(),
                      "; convert or cut it");
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
  const bool narrow = x.scalar_type() != at::kFloat;
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
    multiply(p, true);  // the left operand is three times as large as the right one
  }
  return dw.to(w.scalar_type());
}

LayerGradients layer_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& w, const OptionalTensor& rel_row,
                                  const OptionalTensor& rel_col, const Tensor& qkv, const Tensor& y, const Tensor& top,
                                  const Tensor& sum, int64_t kernel_size, int64_t heads, bool zero_border) {
  check_layer(x, w);
  check(y, y, y, rel_row, rel_col, kernel_size, heads);
  check_layer_backward(dy, x, w, qkv, y, top, sum, heads);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
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

}  // namespace
