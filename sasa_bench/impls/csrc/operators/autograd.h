// Gradients of the operators, once; the gradient of a gradient is refused.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/autograd.h>
#include <torch/library.h>

#include "layer.h"

namespace {

using torch::autograd::variable_list;

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

// The backward pass reads y, to which the next operator may write. So y is saved under a version of its own, and computed again
// where y was written to. A traced y is saved as any other tensor: a trace has no writes.
Tensor kept(torch::autograd::AutogradContext* ctx, const Tensor& y) {
  if (y.is_inference() || y.key_set().has(c10::DispatchKey::Python)) return y;
  const Tensor counter = at::empty({0}, y.options());
  counter.unsafeGetTensorImpl()->set_version_counter(y.unsafeGetTensorImpl()->version_counter());
  ctx->saved_data["counter"] = counter;
  ctx->saved_data["version"] = int64_t(y._version());
  return y.variable_data();
}

bool written(const torch::autograd::AutogradContext* ctx) {
  const auto counter = ctx->saved_data.find("counter");
  return counter != ctx->saved_data.end() &&
         int64_t(counter->second.toTensor()._version()) != ctx->saved_data.at("version").toInt();
}

// What the backward pass needs besides tensors.
struct Axes {
  int64_t kernel_size, heads;
  bool zero_border;
  void keep(torch::autograd::AutogradContext* ctx) const {
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["zero_border"] = zero_border;
  }
  static Axes of(torch::autograd::AutogradContext* ctx) {
    auto& saved = ctx->saved_data;
    return {saved["kernel_size"].toInt(), saved["heads"].toInt(), saved["zero_border"].toBool()};
  }
};

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& rel_row, const OptionalTensor& rel_col, int64_t kernel_size,
                               int64_t heads, bool zero_border) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, top, sum] = call_attention_saving(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border);
    ctx->save_for_backward({q, k, v, rel_row.value_or(Tensor()), rel_col.value_or(Tensor()), kept(ctx, y), top, sum});
    Axes{kernel_size, heads, zero_border}.keep(ctx);
    ctx->set_materialize_grads(false);  // zeros for what has no gradient, as large as q, k and v together
    ctx->mark_non_differentiable({top, sum});
    return {y, top, sum};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(8);
    auto s = ctx->get_saved_variables();
    const auto [kernel_size, heads, zero_border] = Axes::of(ctx);
    const OptionalTensor row = optional(s[3]), col = optional(s[4]);
    if (written(ctx)) {
      at::NoGradGuard no_grad;
      s[5] = std::get<0>(call_attention_saving(s[0], s[1], s[2], row, col, kernel_size, heads, zero_border));
    }
    auto [dq, dk, dv, drow, dcol] =
        call_backward(grads[0], s[0], s[1], s[2], row, col, s[5], s[6], s[7], kernel_size, heads, zero_border);
    const bool relative = row.has_value();
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
    ctx->save_for_backward({x, w, rel_row.value_or(Tensor()), rel_col.value_or(Tensor()), qkv, kept(ctx, y), top, sum});
    Axes{kernel_size, heads, zero_border}.keep(ctx);
    ctx->set_materialize_grads(false);  // zeros for what has no gradient, as large as q, k and v together
    ctx->mark_non_differentiable({qkv, top, sum});
    return {y, qkv, top, sum};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(7);
    auto s = ctx->get_saved_variables();
    const auto [kernel_size, heads, zero_border] = Axes::of(ctx);
    const OptionalTensor row = optional(s[2]), col = optional(s[3]);
    if (written(ctx)) {
      at::NoGradGuard no_grad;
      s[5] = std::get<0>(call_layer_saving(s[0], s[1], row, col, kernel_size, heads, zero_border));
    }
    auto [dx, dw, drow, dcol] =
        call_layer_backward(grads[0], s[0], s[1], row, col, s[4], s[5], s[6], s[7], kernel_size, heads, zero_border);
    const bool relative = row.has_value();
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
