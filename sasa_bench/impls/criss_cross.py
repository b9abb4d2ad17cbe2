"""Criss-cross attention: every pixel attends to its row and its column, and is added to the result."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, layers_only
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    x, gamma = tensors["x"], tensors["gamma"]
    w_qk, w_v = tensors["w_qk"][:, :, None, None], tensors["w_v"][:, :, None, None]
    itself = torch.eye(case.width, dtype=torch.bool, device=case.device)

    def call() -> Tensor:
        q, k = F.conv2d(x, w_qk).permute(0, 2, 3, 1).chunk(2, dim=3)
        v = F.conv2d(x, w_v).permute(0, 2, 3, 1)
        columns = [t.transpose(1, 2) for t in (q, k, v)]
        in_column = (columns[0] @ columns[1].transpose(2, 3)).transpose(1, 2)
        in_row = (q @ k.transpose(2, 3)).masked_fill(itself, -torch.inf)
        of_column, of_row = torch.cat([in_column, in_row], 3).softmax(3).split([case.height, case.width], 3)
        y = (of_column.transpose(1, 2) @ columns[2]).transpose(1, 2) + of_row @ v
        return x + gamma * y.permute(0, 3, 1, 2)

    return call


def _supports(case: Case) -> str | None:
    if reason := layers_only(case):
        return reason
    return None if case.scope == "layer" else "this is a block with projections of its own: give scope = 'layer'"


IMPL = Impl(
    name="criss_cross",
    op=ops.get("criss_cross"),
    summary="criss-cross attention (CCNet), one pass: a pixel's row and column, added to the input",
    build=_build,
    supports=_supports,
    computes=lambda case: case.with_(position="none"),
)
