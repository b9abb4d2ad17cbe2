"""Self-attention over the whole map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Work, input_shapes, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def work(case: Case) -> Work:
    """6 C^2 P for three projections and 4 (H W) C P for q . k and a . v over the whole map, no positions."""
    c, p = case.channels, pixels(case)
    core = 4 * case.height * case.width * c * p
    if case.scope == "core":
        return Work(core, 0, 3 * c * p, c * p)
    return Work(6 * c * c * p + core, 3 * c * c, c * p, c * p)


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over the whole map of softmax(q_ij . k_ab) v_ab, one row of queries at a time."""
    import torch

    from sasa_bench.ops.tensors import project

    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    k, v = k.flatten(3), v.flatten(3)
    rows = []
    for i in range(case.height):
        weights = torch.einsum("nhdj,nhdp->nhjp", q[:, :, :, i], k).softmax(-1)
        rows.append(torch.einsum("nhjp,nhdp->nhdj", weights, v))
    return torch.stack(rows, dim=3).flatten(1, 2)


OP = Op("global_attention", input_shapes, work, reference)
