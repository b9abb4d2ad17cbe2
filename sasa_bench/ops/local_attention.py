"""Local self-attention of Ramachandran et al. 2019 (arXiv 1906.05909)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, also_in_networks, in_windows, input_shapes, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def work(case: Case) -> Work:
    """6 C^2 P for three projections, K^2 C P times 4 (q . k and a . v) or 5 (the paper adds r to k first).

    Absolute positions add C P at the input of the layer. Parameters: 3 C^2, and C K relative or
    (C // 2) H + (C - C // 2) W absolute embeddings.

    Needed are q . k and a . v with the pixels of the window that lie inside the image, 4 C each, and q . r for K rows
    and K columns, as r is one of each: 2 K C P.
    """
    c, p, k = case.channels, pixels(case), case.kernel_size
    relative = case.position == "relative"
    core = (5 if relative else 4) * k * k * c * p
    needed = 4 * c * case.batch * in_windows(case) + (2 * k * c * p if relative else 0)
    embeddings = c * k if relative else 0
    if case.scope == "core":
        return Work(core, embeddings, 3 * c * p, c * p, min(core, needed))
    if case.position == "absolute":
        core += c * p
        needed += c * p
        embeddings = (c // 2) * case.height + (c - c // 2) * case.width
    projections = 6 * c * c * p
    return Work(projections + core, 3 * c * c + embeddings, c * p, c * p, projections + min(core, needed))


def equal_flops_kernel_size(channels: int) -> int:
    """The largest odd K at which a local attention layer costs no more FLOPs than a 3 x 3 convolution.

    6 C^2 + 4 K^2 C <= 18 C^2 gives K^2 <= 3 C; the paper's k = 19 at 128 channels counts projections, q . k and a . v.
    """
    k = int((3 * channels) ** 0.5)
    return k if k % 2 else k - 1


def shapes(case: Case) -> Shapes:
    shapes = input_shapes(case)
    half = case.head_dim // 2
    if case.position == "relative":
        scale = 1.0 if case.scope == "core" else case.head_dim**-0.25
        shapes["rel_row"] = ((case.heads, half, case.kernel_size), scale)
        shapes["rel_col"] = ((case.heads, case.head_dim - half, case.kernel_size), scale)
    elif case.position == "absolute" and case.scope == "layer":
        shapes["abs_row"] = ((case.channels // 2, case.height), 1.0)
        shapes["abs_col"] = ((case.channels - case.channels // 2, case.width), 1.0)
    return shapes


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab + q_ij . r_{a-i,b-j}) v_ab, one row of queries at a time.

    A row of queries meets every pixel of the K rows around it, and a mask removes those outside the window.
    r is concat(rel_row [N, d // 2, K] at a - i, rel_col [N, d - d // 2, K] at b - j), equation 2 of the paper.
    """
    import torch
    from torch.nn import functional as F

    from sasa_bench.ops.tensors import project

    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    radius, window, half = case.radius, case.kernel_size, case.head_dim // 2
    padding = (radius,) * 4
    inside = F.pad(torch.ones(case.height, case.width, dtype=torch.bool, device=q.device), padding)
    k, v = F.pad(k, padding), F.pad(v, padding)
    offset = torch.arange(k.shape[-1], device=q.device) - torch.arange(case.width, device=q.device)[:, None]
    in_window = (offset >= 0) & (offset < window)
    column = offset.clamp(0, window - 1)
    rows = []
    for i in range(case.height):
        query = q[:, :, :, i]
        logits = torch.einsum("nhdj,nhdap->nhjap", query, k[:, :, :, i : i + window])
        if case.position == "relative":
            by_row = torch.einsum("nhdj,hda->nhja", query[:, :, :half], tensors["rel_row"])
            by_column = torch.einsum("nhdj,hdb->nhjb", query[:, :, half:], tensors["rel_col"])
            by_pixel = by_column.gather(3, column.expand(*by_column.shape[:2], -1, -1))
            logits = logits + by_row[..., None] + by_pixel[:, :, :, None, :]
        allowed = in_window[:, None, :]
        if case.border == "mask":
            allowed = allowed & inside[i : i + window]
        weights = logits.masked_fill(~allowed, -torch.inf).flatten(3).softmax(-1).unflatten(3, logits.shape[3:])
        rows.append(torch.einsum("nhjap,nhdap->nhdj", weights, v[:, :, :, i : i + window]))
    return torch.stack(rows, dim=3).flatten(1, 2)


OP = also_in_networks(Op("local_attention", shapes, work, reference))
