"""Attention over the whole map by scaled_dot_product_attention, unscaled as in the paper; no positions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, layers_only
from sasa_bench.ops.tensors import Call, Tensors, project


def _build(case: Case, tensors: Tensors) -> Call:
    def heads(t: Tensor) -> Tensor:
        # Without contiguous() torch falls back to the kernel that writes all (H W)^2 logits to memory.
        return t.reshape(len(t), case.heads, case.head_dim, -1).transpose(-1, -2).contiguous()

    def call() -> Tensor:
        q, k, v = project(case, tensors)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), scale=1.0)
        return y.transpose(-1, -2).reshape(q.shape)

    return call


IMPL = Impl(
    name="global_attention",
    op=ops.get("global_attention"),
    summary="every pixel attends to the whole map (scaled_dot_product_attention)",
    build=_build,
    supports=layers_only,
    computes=lambda case: case.with_(position="none"),
)
