"""Local attention by blocks, arranged for a runtime of standard operators: copies are gathers of whole pixels.

A square of S x S queries meets its halo of (S + K - 1)^2 keys in one matrix product, and a constant masks the pairs
outside the exact window. Each head's pixels are first laid out one after the other, so that blocks and halos are one
gather each of d contiguous channels, as is the way back; a pixel outside the image is any pixel, masked, or a pixel of
zeros.

r of Ramachandran et al. 2019 (arXiv 1906.05909, eq. 4) depends on a query only through its place in its block. So q . r
is one matrix product for each of the S^2 places, over all blocks at once, with a table made of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Attend, _onnx, local_attention

BLOCK = 4
"""S, the side of a block of queries, pixels."""

MASKED = -1e4
"""Added to a masked logit: finite in float16, and so far below any logit that its weight is 0."""


@dataclass(frozen=True)
class Tables:
    """What depends on the size of the map alone; h = S + K - 1.

    queries  [blocks S^2]: pixels of every block; the last ones are repeated to fill up blocks
    keys     [blocks h^2]: pixels of every halo; outside the image a border pixel, or H W at border "zero"
    pixels   [H W]: where the blocks hold each pixel
    mask     [blocks, S^2, h^2]: 0, or MASKED
    """

    queries: Tensor
    keys: Tensor
    pixels: Tensor
    mask: Tensor


def tables(height: int, width: int, window: int, border: str, like: Tensor) -> Tables:
    """The tables of a map of `height` x `width` pixels, either of which may be symbolic, for the dtype of `like`."""
    device, radius = like.device, window // 2

    def side(n: int) -> tuple[Tensor, Tensor]:
        start = torch.arange((n + BLOCK - 1) // BLOCK, device=device)[:, None] * BLOCK
        place = torch.arange(BLOCK, device=device)
        return start + place, start + torch.arange(BLOCK + window - 1, device=device) - radius

    def seen(queries: Tensor, keys: Tensor, n: int) -> Tensor:
        near = (keys[:, None] - queries.clamp(max=n - 1)[:, :, None]).abs() <= radius
        return near & ((keys >= 0) & (keys < n))[:, None] if border == "mask" else near

    def pairs(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows.clamp(0, height - 1)[:, None, :, None] * width + columns.clamp(0, width - 1)[:, None]).flatten()

    (rows, key_rows), (columns, key_columns) = side(height), side(width)
    keys = pairs(key_rows, key_columns)
    if border == "zero":
        inside_rows, inside_columns = (key_rows >= 0) & (key_rows < height), (key_columns >= 0) & (key_columns < width)
        inside = inside_rows[:, None, :, None] & inside_columns[:, None]
        keys = torch.where(inside.flatten(), keys, height * width)
    by_row, by_column = seen(rows, key_rows, height), seen(columns, key_columns, width)
    allowed = by_row[:, None, :, None, :, None] & by_column[:, None, :, None, :]
    i, j = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    block = i // BLOCK * ((width + BLOCK - 1) // BLOCK) + j // BLOCK
    return Tables(
        queries=pairs(rows, columns),
        keys=keys,
        pixels=(block * BLOCK**2 + i % BLOCK * BLOCK + j % BLOCK).flatten(),
        mask=torch.where(allowed, 0.0, MASKED).to(like.dtype).flatten(4, 5).flatten(2, 3).flatten(0, 1),
    )


def by_place(rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """[N, d // 2, K] and [N, d - d // 2, K] -> [N, S^2, d, h^2]: r of every key of the halo, for each place of a query.

    Keys outside the window get 0.
    """
    window = rel_row.shape[2]
    rows, columns = (
        torch.stack([F.pad(rel, (i, BLOCK - 1 - i)) for i in range(BLOCK)], dim=1) for rel in (rel_row, rel_col)
    )
    halo = BLOCK + window - 1
    rows = rows[:, :, None, :, :, None].expand(-1, -1, BLOCK, -1, -1, halo)
    columns = columns[:, None, :, :, None, :].expand(-1, BLOCK, -1, -1, halo, -1)
    return torch.cat([rows, columns], dim=3).flatten(4, 5).flatten(1, 2)


def core(
    case: Case, at: Tables, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """y [B, C, H, W] of q, k, v [B, C, H, W] with the tables of their size."""
    height, width = q.shape[2:]
    halo = BLOCK + case.kernel_size - 1

    def gather(t: Tensor, pixels: Tensor, size: int, zeros: int = 0) -> Tensor:
        t = t.unflatten(1, (case.heads, case.head_dim)).flatten(3).transpose(2, 3)
        if zeros:
            t = F.pad(t, (0, 0, 0, zeros))
        return t.index_select(2, pixels).unflatten(2, (-1, size))

    outside = 1 if case.border == "zero" else 0
    q = gather(q, at.queries, BLOCK**2)
    k, v = gather(k, at.keys, halo**2, outside), gather(v, at.keys, halo**2, outside)
    logits = q @ k.transpose(3, 4)
    if rel_row is not None and rel_col is not None:
        logits = logits + (q.transpose(2, 3) @ by_place(rel_row, rel_col)).transpose(2, 3)
    y = (logits + at.mask).softmax(4) @ v
    y = y.flatten(2, 3).index_select(2, at.pixels)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))


def attend(case: Case) -> Attend:
    """The core for maps of one size; its tables are made once."""
    like = torch.empty(0, dtype=getattr(torch, case.dtype), device=case.device)
    at = tables(case.height, case.width, case.kernel_size, case.border, like)
    return lambda q, k, v, rel_row, rel_col: core(case, at, q, k, v, rel_row, rel_col)


def attend_any_size(case: Case) -> Attend:
    """The core for maps of every size; its tables are made in the call."""

    def sized(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        at = tables(q.shape[2], q.shape[3], case.kernel_size, case.border, q)
        return core(case, at, q, k, v, rel_row, rel_col)

    return sized


IMPL = local_attention("gathered", "blocks by gathers of whole pixels, one matrix product and a mask", attend)
ONNX = _onnx.exported_attention(
    "onnx", "the gathered formulation in ONNX Runtime, for one size", attend, exports="gathered"
)
ONNX_DYNAMIC = _onnx.exported_attention(
    "onnx_dynamic",
    "the gathered formulation in ONNX Runtime, one model for every size",
    attend_any_size,
    exports="gathered",
    dynamic=True,
)
