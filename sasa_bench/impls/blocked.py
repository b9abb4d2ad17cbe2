"""Local attention by blocks: a square of queries meets its halo of keys in one matrix product, then a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Attend, _compiled, _onnx, local_attention

BLOCK, SMALL_MAP = 4, 8
"""Side of a block of queries, pixels; a map of at most SMALL_MAP pixels a side is one block."""


def attend(case: Case) -> Attend:
    """Blocks of S x S queries against halos of (S + K - 1)^2 keys; pairs outside the exact window are masked."""
    height, width, window, radius = case.height, case.width, case.kernel_size, case.radius
    size = max(height, width) if max(height, width) <= SMALL_MAP else BLOCK
    halo, half = size + window - 1, case.head_dim // 2
    down, across = -(-height // size), -(-width // size)
    bottom, right = down * size - height, across * size - width
    padding = (radius, radius + right, radius, radius + bottom)
    steps = torch.arange(halo, device=case.device) - torch.arange(size, device=case.device)[:, None]
    near = (steps >= 0) & (steps < window)
    offset = steps.clamp(0, window - 1)
    allowed = (near[:, None, :, None] & near[None, :, None, :]).expand(down, across, -1, -1, -1, -1)
    if case.border == "mask":
        inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=case.device), padding)
        seen = inside.unfold(0, halo, size).unfold(1, halo, size)
        queries = F.pad(inside[radius : radius + height, radius : radius + width], (0, right, 0, bottom))
        pad_queries = ~queries.unfold(0, size, size).unfold(1, size, size)
        # A query that only fills up its block may see nothing; let it see all, its result is cut off.
        allowed = allowed & (seen[:, :, None, None] | pad_queries[..., None, None])
    blocked_out = torch.zeros(allowed.shape, device=case.device, dtype=getattr(torch, case.dtype))
    blocked_out = blocked_out.masked_fill_(~allowed, -torch.inf).view(1, 1, down * across, size**2, halo**2)

    def halos(t: Tensor) -> Tensor:
        t = F.pad(t.unflatten(1, (case.heads, case.head_dim)), padding)
        t = t.unfold(3, halo, size).unfold(4, halo, size)
        return t.permute(0, 1, 3, 4, 2, 5, 6).reshape(len(t), case.heads, down * across, case.head_dim, halo**2)

    def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        batch = len(q)
        q = F.pad(q.unflatten(1, (case.heads, case.head_dim)), (0, right, 0, bottom))
        q = q.unflatten(4, (across, size)).unflatten(3, (down, size))
        q = q.permute(0, 1, 3, 5, 4, 6, 2).reshape(batch, case.heads, down * across, size**2, case.head_dim)
        logits = q @ halos(k) + blocked_out
        if rel_row is not None and rel_col is not None:
            by_row = (q[..., :half] @ rel_row[:, None]).unflatten(3, (size, size))
            by_column = (q[..., half:] @ rel_col[:, None]).unflatten(3, (size, size))
            shape = (batch, case.heads, down * across, size, size, halo)
            by_row = by_row.gather(5, offset[:, None, :].expand(shape))
            by_column = by_column.gather(5, offset[None, :, :].expand(shape))
            logits = logits + (by_row[..., None] + by_column[..., None, :]).view_as(logits)
        y = logits.softmax(-1) @ halos(v).transpose(-1, -2)
        y = y.view(batch, case.heads, down, across, size, size, case.head_dim)
        y = y.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, case.channels, down * size, across * size)
        return y[:, :, :height, :width]

    return core


def _compiles(case: Case) -> str | None:
    if case.device == "cpu" and case.mode != "forward":
        return (
            "torch.compile makes a backward pass of Tensor.unfold for the CPU that gives wrong gradients or crashes: "
            "give mode = 'forward'"
        )
    return None


IMPL = local_attention("blocked", "blocks of queries against a halo of keys by matrix product, masked", attend)
ONNX = _onnx.exported_attention("onnx_blocked", "the blocked formulation in ONNX Runtime", attend, exports="blocked")
COMPILED = _compiled.compiled_attention(
    "compiled_blocked", "the blocked formulation through torch.compile", attend, _compiles
)
