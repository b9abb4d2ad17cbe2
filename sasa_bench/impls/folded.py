"""Local attention by blocks with nothing but one matrix product between the copies and the softmax.

As in other blocked formulations, a square of queries meets its halo of keys, and pairs outside the exact window are
masked. Here mask and relative term cost no pass over the logits: they are further channels of q and k.

A block of S x S queries has a halo of S + K - 1 rows, and any that many successive rows are distinct modulo S + K - 1.
So a key gets a one-hot vector of its row and one of its column, modulo the side of the halo; a query gets, in those
channels, q . r plus MASKED where that row (or column) is outside its window or the image. Their product with the
one-hot vectors is the row logit plus the column logit of the pair: r of Ramachandran et al. 2019 (arXiv 1906.05909,
eq. 4) is the concatenation of a row and a column part, so q . r is a sum of both, and so is the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Attend, _onnx, local_attention

BLOCK = 4
"""Side of a block of queries, pixels."""

MASKED = -1e4
"""Added to a masked logit, once or twice: finite in float16, and far below any logit, so that its weight is 0."""


@dataclass(frozen=True)
class Side:
    """One side of the map, of n pixels in `blocks` blocks.

    slots    [S + K - 1, padded n], one-hot: the channel in which a padded pixel meets its queries
    offset   [n, S + K - 1]: the place in the window that a query's channel stands for, or 0 where it is masked
    mask     [n, S + K - 1]: 0, or MASKED
    queries  [blocks, S]: pixels of each block; the last one is repeated to fill up the last block
    keys     [blocks, S + K - 1]: padded pixels of each halo
    """

    blocks: int
    padded: int
    slots: Tensor
    offset: Tensor
    mask: Tensor
    queries: Tensor
    keys: Tensor


def side(n: int, window: int, border: str, like: Tensor) -> Side:
    """The tables of one side of the map, in the dtype and on the device of `like`; n may be symbolic."""
    halo, radius, device = BLOCK + window - 1, window // 2, like.device
    blocks = (n + BLOCK - 1) // BLOCK
    padded = blocks * BLOCK + window - 1
    slot, pixel = torch.arange(halo, device=device), torch.arange(n, device=device)[:, None]
    first = pixel // BLOCK * BLOCK
    offset = (slot - first) % halo - (pixel - first)
    seen = (offset >= 0) & (offset < window)
    if border == "mask":
        key = pixel + offset - radius
        seen = seen & (key >= 0) & (key < n)
    start = torch.arange(blocks, device=device)[:, None] * BLOCK
    return Side(
        blocks,
        padded,
        slots=(slot[:, None] == torch.arange(padded, device=device) % halo).to(like.dtype),
        offset=torch.where(seen, offset, 0),
        mask=torch.where(seen, 0.0, MASKED).to(like.dtype),
        queries=(start + torch.arange(BLOCK, device=device)).clamp(max=n - 1),
        keys=start + slot,
    )


@dataclass(frozen=True)
class Tables:
    """What depends on the size of the map alone.

    keys       [blocks (S + K - 1)^2]: padded pixels of every halo
    queries    [blocks S^2]: pixels of every block
    pixels     [H W]: where the blocks hold each pixel
    slots      [2 (S + K - 1), padded pixels]: further channels of k
    mask       [H W, 2 (S + K - 1)]: further channels of q
    """

    rows: Side
    columns: Side
    keys: Tensor
    queries: Tensor
    pixels: Tensor
    slots: Tensor
    mask: Tensor


def tables(height: int, width: int, window: int, border: str, like: Tensor) -> Tables:
    """The tables of a map of `height` x `width` pixels, either of which may be symbolic."""
    rows, columns = side(height, window, border, like), side(width, window, border, like)
    i = torch.arange(height, device=like.device)[:, None]
    j = torch.arange(width, device=like.device)
    block = i // BLOCK * columns.blocks + j // BLOCK
    return Tables(
        rows,
        columns,
        keys=(rows.keys[:, None, :, None] * columns.padded + columns.keys[:, None]).flatten(),
        queries=(rows.queries[:, None, :, None] * width + columns.queries[:, None]).flatten(),
        pixels=(block * BLOCK**2 + i % BLOCK * BLOCK + j % BLOCK).flatten(),
        slots=torch.cat(
            [
                rows.slots[:, :, None].expand(-1, -1, columns.padded),
                columns.slots[:, None, :].expand(-1, rows.padded, -1),
            ]
        ).flatten(1),
        mask=torch.cat(
            [rows.mask[:, None].expand(-1, width, -1), columns.mask.expand(height, -1, -1)],
            dim=2,
        ).flatten(0, 1),
    )


def by_side(rel: Tensor, at: Side, before: int, after: int) -> Tensor:
    """rel [N, d', K] -> [N, n, before + d' + after, S + K - 1]: the embedding of each further channel."""
    found = F.pad(rel, (0, 0, before, after)).index_select(2, at.offset.flatten())
    return found.unflatten(2, at.offset.shape).transpose(1, 2)


def core(
    case: Case, at: Tables, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """y [B, C, H, W] of q, k, v [B, C, H, W] with the tables of their size."""
    batch, _, height, width = q.shape
    heads, d, window, radius = case.heads, case.head_dim, case.kernel_size, case.radius
    halo = BLOCK + window - 1
    right, bottom = at.columns.padded - width - radius, at.rows.padded - height - radius
    q = q.unflatten(1, (heads, d)).flatten(3).transpose(2, 3)
    if rel_row is not None and rel_col is not None:
        half, image = d // 2, q.unflatten(2, (height, width))
        by_row = image @ by_side(rel_row, at.rows, 0, d - half)
        by_column = (image.transpose(2, 3) @ by_side(rel_col, at.columns, half, 0)).transpose(2, 3)
        further = torch.cat([by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=3) + at.mask
    else:
        further = at.mask.expand(batch, heads, -1, -1)
    k = F.pad(k, (radius, right, radius, bottom)).unflatten(1, (heads, d)).flatten(3)
    v = F.pad(v, (radius, right, radius, bottom)).unflatten(1, (heads, d)).flatten(3)
    k = torch.cat([k, at.slots.expand(batch, heads, -1, -1)], dim=2)
    q = torch.cat([q, further], dim=3).index_select(2, at.queries).unflatten(2, (-1, BLOCK**2))
    k = k.transpose(2, 3).index_select(2, at.keys).unflatten(2, (-1, halo**2))
    v = v.transpose(2, 3).index_select(2, at.keys).unflatten(2, (-1, halo**2))
    y = ((q @ k.transpose(3, 4)).softmax(4) @ v).flatten(2, 3).index_select(2, at.pixels)
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


IMPL = local_attention("folded", "blocks by matrix product; mask and positions are further channels of q and k", attend)
ONNX = _onnx.exported_attention("onnx", "the folded formulation in ONNX Runtime, for one size", attend)
ONNX_DYNAMIC = _onnx.exported_attention(
    "onnx_dynamic", "the folded formulation in ONNX Runtime, one model for every size", attend_any_size, dynamic=True
)
