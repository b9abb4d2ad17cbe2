// The torch operators over the kernels (local_attention.h). The kernels themselves live in libraries of their own,
// one per instruction set, so that this file is compiled once and for the least capable processor.
#include "operators/autograd.h"

TORCH_LIBRARY_FRAGMENT(sasa_bench, m) {
  m.def("fused_use_kernels(str forward, str backward, str products) -> bool", &use_kernels);
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
