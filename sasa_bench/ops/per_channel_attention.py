"""Local attention with a softmax for each channel, as a public re-implementation of the paper computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, input_shapes, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def work(case: Case) -> Work:
    """6 C^2 P for three projections, K^2 C P times 3 (q k, and a v added up), or 4 with embeddings added to k first.

    A product of q and k is not added up over the channels of a head. Parameters: 3 C^2, and C K embeddings.
    """
    c, p, k = case.channels, pixels(case), case.kernel_size
    relative = case.position == "relative"
    core, embeddings = (4 if relative else 3) * k * k * c * p, c * k if relative else 0
    if case.scope == "core":
        return Work(core, embeddings, 3 * c * p, c * p)
    return Work(6 * c * c * p + core, 3 * c * c + embeddings, c * p, c * p)


def shapes(case: Case) -> Shapes:
    c, half = case.channels, case.channels // 2
    scale = 1.0 if case.scope == "core" else c**-0.5
    shapes = {name: (shape, 1.0) for name, (shape, _) in input_shapes(case).items()}
    shapes |= {"w_qkv": ((3 * c, c), scale)} if case.scope == "layer" else {}
    if case.position == "relative":
        shapes |= {"rel_row": ((half, case.kernel_size), 1.0), "rel_col": ((c - half, case.kernel_size), 1.0)}
    return shapes


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_c,ij = sum over ab of softmax_ab(q_c,ij (k_c,ab + r_c,ab-ij)) v_c,ab for each channel c, one row at a time.

    k and v outside the map are 0 and take part. r is rel_row [C // 2, K] at a - i for the first half of the channels
    and rel_col [C - C // 2, K] at b - j for the rest.
    """
    import torch
    from torch.nn import functional as F

    from sasa_bench.ops.tensors import project

    q, k, v = project(case, tensors)
    window = case.kernel_size
    k, v = F.pad(k, (case.radius,) * 4), F.pad(v, (case.radius,) * 4)
    rows = []
    for i in range(case.height):
        keys, values = (t[:, :, i : i + window].unfold(3, window, 1) for t in (k, v))  # [B, C, K, W, K]
        if case.position == "relative":
            by_row = tensors["rel_row"][:, :, None, None].expand(-1, -1, 1, window)
            by_column = tensors["rel_col"][:, None, None, :].expand(-1, window, 1, -1)
            keys = keys + torch.cat([by_row, by_column])
        logits = torch.einsum("ncj,ncajb->ncjab", q[:, :, i], keys)
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        rows.append(torch.einsum("ncjab,ncajb->ncj", weights, values))
    return torch.stack(rows, dim=2)


OP = Op("per_channel_attention", shapes, work, reference)
