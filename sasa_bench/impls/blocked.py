"""Local attention by blocks: a square of queries meets its halo of keys in one matrix product, then a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _compiled, _onnx, _windows, local_attention
from sasa_bench.networks.core import sizes

BLOCK, SMALL_MAP = 4, 8
"""Side of a block of queries, pixels; a map of at most SMALL_MAP pixels a side is one block."""


def _block(height: int, width: int) -> int:
    """S, the side of a block. A size that is symbolic is not asked about, so that one graph serves them all."""
    known = isinstance(height, int) and isinstance(width, int)
    return max(height, width) if known and max(height, width) <= SMALL_MAP else BLOCK


def _blocks(height: int, width: int) -> tuple[int, int, int]:
    """S, and how many blocks there are down and across."""
    size = _block(height, width)
    return size, (height + size - 1) // size, (width + size - 1) // size


def tables(window: Window, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step from a query's row to that of each key of the halo, the same of columns, and which keys are outside."""
    size, down, across = _blocks(height, width)
    device = like.device

    def side(blocks: int, n: int, length: int) -> tuple[Tensor, Tensor]:
        """[S, h] steps within the window, and [blocks, S, h] whether the key is in it."""
        steps = torch.arange(size + length - 1, device=device) - torch.arange(size, device=device)[:, None]
        near = (steps >= 0) & (steps < length)
        start = torch.arange(blocks, device=device)[:, None] * size
        key = start + torch.arange(size + length - 1, device=device) - length // 2
        seen = (key >= 0) & (key < n)
        if window.border != "mask":
            seen = torch.ones_like(seen)
        # A query that only fills up its block may see nothing; let it see all, its result is cut off.
        fills = start + torch.arange(size, device=device) >= n
        return steps.clamp(0, length - 1), near & (seen[:, None] | fills[..., None])

    (row_steps, rows), (column_steps, columns) = side(down, height, window.rows), side(across, width, window.columns)
    allowed = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return row_steps, column_steps, ~allowed.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def run(
    window: Window,
    at: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
) -> Tensor:
    """Blocks of S x S queries against halos of (S + K - 1)^2 keys; pairs outside the exact window are masked."""
    row_steps, column_steps, outside = at
    batch, channels, height, width = sizes(q)
    size, down, across = _blocks(height, width)
    heads, d = window.heads, channels // window.heads
    halo = size + window.rows - 1, size + window.columns - 1
    bottom, right = down * size - height, across * size - width
    left, _, top, _ = window.padding

    def halos(t: Tensor) -> Tensor:
        t = F.pad(t, (left, left + right, top, top + bottom))
        t = t.unfold(3, halo[0], size).unfold(4, halo[1], size)
        return t.permute(0, 1, 3, 4, 2, 5, 6).reshape(batch, heads, down * across, d, halo[0] * halo[1])

    k, v, nonfinite = _windows.finite(k.unflatten(1, (heads, d)), v.unflatten(1, (heads, d)), dim=2)
    block = F.pad(q.unflatten(1, (heads, d)), (0, right, 0, bottom))
    block = block.reshape(batch, heads, d, down, size, across, size)
    block = block.permute(0, 1, 3, 5, 4, 6, 2).reshape(batch, heads, down * across, size**2, d)
    logits = block @ halos(k)
    if rel_row is not None and rel_col is not None:
        by_row = (block[..., : d // 2] @ rel_row[:, None]).unflatten(3, (size, size))
        by_column = (block[..., d // 2 :] @ rel_col[:, None]).unflatten(3, (size, size))
        shape = (batch, heads, down * across, size, size)
        by_row = by_row.gather(5, row_steps[:, None, :].expand(*shape, halo[0]))
        by_column = by_column.gather(5, column_steps[None, :, :].expand(*shape, halo[1]))
        logits = logits + (by_row[..., None] + by_column[..., None, :]).view_as(logits)
    y = _windows.softmax(logits, outside) @ halos(v).transpose(-1, -2)
    y = y.view(batch, heads, down, across, size, size, d)
    y = y.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, heads, d, down * size, across * size)
    return _windows.add_nonfinite(window, y[..., :height, :width], nonfinite, dim=2).flatten(1, 2)


def _compiles(case: Case) -> str | None:
    if case.device == "cpu" and case.mode != "forward":
        return (
            "torch.compile makes a backward pass of Tensor.unfold for the CPU that gives wrong gradients or crashes: "
            "give mode = 'forward'"
        )
    return None


CORE = Core(run, tables, open_sizes=False)
IMPL = local_attention("blocked", "blocks of queries against a halo of keys by matrix product, masked", core=CORE)
ONNX = _onnx.exported_attention("onnx_blocked", "the blocked formulation in ONNX Runtime", CORE, exports="blocked")
COMPILED = _compiled.compiled_attention(
    "compiled_blocked", "the blocked formulation through torch.compile", CORE, _compiles
)
