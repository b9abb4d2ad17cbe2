"""Local attention by blocks, arranged for a runtime of standard operators: copies are gathers of runs of pixels.

A square of S x S queries meets its halo of (S + K - 1)^2 keys in one matrix product, and a constant masks the pairs
outside the exact window. The map is padded to whole blocks and their halos, and each head's pixels are laid out one
after the other, so that blocks and halos are one gather each of runs of d channels, as is the way back.

q . r of Ramachandran et al. 2019 (arXiv 1906.05909, eq. 4) is a sum of a term for the row and one for the column of a
key. So S + K - 1 of each, for every query, become those of all (S + K - 1)^2 keys in one product with a matrix of ones
and zeros, and the mask comes along: it is a sum of a row's and a column's as well.
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

RUN = 2
"""Adjacent pixels that are copied together; divides S and S + K - 1."""

PARTS = 4
"""The blocks of a map of known size are done in so many turns: what lies between the products stays in caches."""

MASKED = -1e4
"""Added to a masked logit, once or twice: finite in float16, and so far below any logit that its weight is 0."""


@dataclass(frozen=True)
class Tables:
    """What depends on the size of the map alone; h = S + K - 1.

    queries  [blocks, S]: the runs of S pixels of every block, in the map padded to whole blocks
    keys     [blocks, h h / RUN]: the runs of every halo, in the map padded to whole halos
    pixels   [rows of the padded map x blocks in a row]: where the blocks hold each run of S pixels
    mask     [blocks, S^2, 2 h]: 0, or MASKED, for the rows of a halo and for its columns
    """

    queries: Tensor
    keys: Tensor
    pixels: Tensor
    mask: Tensor


def tables(height: int, width: int, window: int, border: str, like: Tensor) -> Tables:
    """The tables of a map of `height` x `width` pixels, either of which may be symbolic, for the dtype of `like`."""
    device, radius, halo = like.device, window // 2, BLOCK + window - 1
    down, across = (height + BLOCK - 1) // BLOCK, (width + BLOCK - 1) // BLOCK

    def runs(side: int, run: int) -> Tensor:
        row = (torch.arange(down, device=device) * BLOCK)[:, None] + torch.arange(side, device=device)
        column = (torch.arange(across, device=device) * (BLOCK // run))[:, None]
        column = column + torch.arange(side // run, device=device)
        in_a_row = (across * BLOCK + side - BLOCK) // run
        return (row[:, None, :, None] * in_a_row + column[:, None]).flatten()

    def masked(blocks: int, n: int) -> Tensor:
        start = torch.arange(blocks, device=device)[:, None] * BLOCK
        key = start + torch.arange(halo, device=device) - radius
        query = start + torch.arange(BLOCK, device=device)
        near = (key[:, None] - query[:, :, None]).abs() <= radius
        seen = near & ((key >= 0) & (key < n))[:, None] if border == "mask" else near
        return torch.where(seen, 0.0, MASKED).to(like.dtype)

    pairs = (down, across, BLOCK, BLOCK, halo)
    rows = masked(down, height)[:, None, :, None].expand(pairs)
    columns = masked(across, width)[None, :, None].expand(pairs)
    i, j = torch.arange(down * BLOCK, device=device)[:, None], torch.arange(across, device=device)
    return Tables(
        queries=runs(BLOCK, BLOCK).unflatten(0, (-1, BLOCK)),
        keys=runs(halo, RUN).unflatten(0, (-1, halo * halo // RUN)),
        pixels=((i // BLOCK * across + j) * BLOCK + i % BLOCK).flatten(),
        mask=torch.cat([rows, columns], dim=4).flatten(2, 3).flatten(0, 1),
    )


def by_place(rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """[N, d // 2, K] and [N, d - d // 2, K] -> [N, S^2, d, 2 h]: r of every row and column of the halo, by place.

    Rows and columns outside the window get 0.
    """
    rows, columns = (
        torch.stack([F.pad(rel, (i, BLOCK - 1 - i)) for i in range(BLOCK)], dim=1) for rel in (rel_row, rel_col)
    )
    halo = rows.shape[3]
    rows = F.pad(rows, (0, halo, 0, rel_col.shape[1]))[:, :, None].expand(-1, -1, BLOCK, -1, -1)
    columns = F.pad(columns, (halo, 0, rel_row.shape[1], 0))[:, None].expand(-1, BLOCK, -1, -1, -1)
    return (rows + columns).flatten(1, 2)


def spread(halo: int, like: Tensor) -> Tensor:
    """[2 h, h^2]: 1 where a key of the halo lies in the row or in the column, in the dtype of `like`."""
    each = torch.eye(halo, dtype=like.dtype, device=like.device)
    return torch.cat([each.repeat_interleave(halo, dim=1), each.repeat(1, halo)])


def core(
    case: Case, at: Tables, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, parts: int
) -> Tensor:
    """y [B, C, H, W] of q, k, v [B, C, H, W] with the tables of their size; the blocks are done in so many parts."""
    batch, _, height, width = q.shape
    radius, halo, heads, d = case.kernel_size // 2, BLOCK + case.kernel_size - 1, case.heads, case.head_dim
    below, right = -height % BLOCK, -width % BLOCK

    def in_runs(t: Tensor, run: int, padding: tuple[int, int, int, int]) -> Tensor:
        t = t.unflatten(1, (heads, d)).permute(0, 1, 3, 4, 2)
        if not all(isinstance(n, int) and n == 0 for n in padding):  # a runtime would copy for nothing
            t = F.pad(t, (0, 0, *padding))
        return t.reshape(batch, heads, -1, run * d)

    def gather(t: Tensor, runs: Tensor, size: int) -> Tensor:
        return t.index_select(2, runs.flatten()).reshape(batch, heads, -1, size, d)

    q = in_runs(q, BLOCK, (0, right, 0, below))
    k, v = (in_runs(t, RUN, (radius, right + radius, radius, below + radius)) for t in (k, v))
    places = by_place(rel_row, rel_col) if rel_row is not None and rel_col is not None else None
    ones = spread(halo, at.mask)

    def attended(queries: Tensor, keys: Tensor, away: Tensor) -> Tensor:
        block, k_halo, v_halo = gather(q, queries, BLOCK**2), gather(k, keys, halo**2), gather(v, keys, halo**2)
        if places is not None:
            away = away + (block.transpose(2, 3) @ places).transpose(2, 3)
        return (block @ k_halo.transpose(3, 4) + away @ ones).softmax(4) @ v_halo

    split = (t.tensor_split(parts) for t in (at.queries, at.keys, at.mask))
    y = torch.cat([attended(*part) for part in zip(*split, strict=True)], dim=2)
    y = y.reshape(batch, heads, -1, BLOCK * d).index_select(2, at.pixels)
    y = y.reshape(batch, heads, height + below, width + right, d)[:, :, :height, :width]
    return y.permute(0, 1, 4, 2, 3).flatten(1, 2)


def attend(case: Case) -> Attend:
    """The core for maps of one size; its tables are made once."""
    like = torch.empty(0, dtype=getattr(torch, case.dtype), device=case.device)
    at = tables(case.height, case.width, case.kernel_size, case.border, like)
    parts = min(PARTS, len(at.mask))
    return lambda q, k, v, rel_row, rel_col: core(case, at, q, k, v, rel_row, rel_col, parts)


def attend_any_size(case: Case) -> Attend:
    """The core for maps of every size; its tables are made in the call, and all blocks are done at once."""

    def sized(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        at = tables(q.shape[2], q.shape[3], case.kernel_size, case.border, q)
        return core(case, at, q, k, v, rel_row, rel_col, 1)

    return sized


IMPL = local_attention("gathered", "blocks by gathers of runs of pixels, matrix products and a mask", attend)
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
