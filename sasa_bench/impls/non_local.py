"""The non-local block: every pixel attends to the whole map at half of the channels, and is added to the result."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, layers_only
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    x, w_qkv, w_out = tensors["x"], tensors["w_qkv"][:, :, None, None], tensors["w_out"][:, :, None, None]

    def call() -> Tensor:
        # Without contiguous() torch falls back to the kernel that writes all (H W)^2 logits to memory.
        q, k, v = F.conv2d(x, w_qkv).flatten(2).transpose(1, 2).contiguous()[:, None].chunk(3, dim=3)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        return x + F.conv2d(y.transpose(1, 2).unflatten(2, (case.height, case.width)), w_out)

    return call


def _supports(case: Case) -> str | None:
    if reason := layers_only(case):
        return reason
    return None if case.scope == "layer" else "this is a block with projections of its own: give scope = 'layer'"


IMPL = Impl(
    name="non_local",
    op=ops.get("non_local"),
    summary="non-local block: the whole map at half of the channels, added to the input",
    build=_build,
    supports=_supports,
    computes=lambda case: case.with_(position="none"),
)
