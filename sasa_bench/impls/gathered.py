"""Local attention by blocks, arranged for a runtime of standard operators: copies are gathers of runs of pixels.

A square of S x S queries meets its halo of (S + K - 1)^2 keys in one matrix product, and a constant masks the pairs
outside the exact window. The map is padded to whole blocks and their halos, and each head's pixels are laid out one
after the other, so that blocks and halos are one gather each of runs of d channels, as is the way back.

q . r of Ramachandran et al. 2019 (arXiv 1906.05909, eq. 4) is a sum of a term for the row and one for the column of a
key. So S + K - 1 of each, for every query, become those of all (S + K - 1)^2 keys in one product with a matrix of ones
and zeros.

A narrow map needs neither blocks nor gathers: the keys of a band of rows are rows that lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.impls import Core, Window, _onnx, _windows, local_attention
from sasa_bench.networks.core import sizes

Softmax = Callable[[Tensor, Tensor], Tensor]
"""(logits, which keys are outside) -> weights."""

BLOCK = 4
"""S, the side of a block of queries, pixels."""

RUN = 2
"""Adjacent pixels that are copied together; divides S and S + K - 1."""

PARTS = 4
"""The blocks of a map of known size are done in so many turns: what lies between the products stays in caches."""


NARROW, BAND = 16, 2
"""A map of known size with at most so many rows and columns is done in bands of so many rows of queries."""

SMALL_MAP = 64
"""A map of at most so many pixels is one band."""


def bands(window: Window, height: int, width: int) -> list[tuple[slice, slice]] | None:
    """The rows of queries and of keys of each band; None for blocks.

    At border "zero" keys outside the map take part, which are those of halos.
    """
    known = isinstance(height, int) and isinstance(width, int)
    if not known or max(height, width) > NARROW or window.border != "mask":
        return None
    rows = height if height * width <= SMALL_MAP else BAND
    reach = window.radii[0]
    return [
        (slice(i, min(i + rows, height)), slice(max(i - reach, 0), min(i + rows + reach, height)))
        for i in range(0, height, rows)
    ]


def tables(window: Window, height: int, width: int, like: Tensor) -> tuple[Tensor, ...]:
    """The tables of a map of `height` x `width` pixels, either of which may be symbolic, on the device of `like`.

    With halos of h x w pixels, h = S + Kh - 1 and w = S + Kw - 1:

    queries  [blocks, S]: the runs of S pixels of every block, in the map padded to whole blocks
    keys     [blocks, h w / RUN]: the runs of every halo, in the map padded to whole halos
    pixels   [rows of the padded map x blocks in a row]: where the blocks hold each run of S pixels
    outside  [blocks, S^2, h w]: whether a key is outside the window of the query

    Of a map in bands the last of each, [rows of queries x W, rows of keys x W].
    """
    device = like.device
    if in_bands := bands(window, height, width):
        row_near, column_near = (
            (torch.arange(n, device=device) - torch.arange(n, device=device)[:, None]).abs() <= radius
            for n, radius in zip((height, width), window.radii, strict=True)
        )
        return tuple(
            ~(row_near[rows, keys][:, None, :, None] & column_near[:, None]).flatten(2).flatten(0, 1)
            for rows, keys in in_bands
        )
    down, across = (height + BLOCK - 1) // BLOCK, (width + BLOCK - 1) // BLOCK

    def runs(rows: int, columns: int, run: int) -> Tensor:
        row = (torch.arange(down, device=device) * BLOCK)[:, None] + torch.arange(rows, device=device)
        column = (torch.arange(across, device=device) * (BLOCK // run))[:, None]
        column = column + torch.arange(columns // run, device=device)
        in_a_row = (across * BLOCK + columns - BLOCK) // run
        return (row[:, None, :, None] * in_a_row + column[:, None]).flatten(2).flatten(0, 1)

    def seen(blocks: int, n: int, length: int) -> Tensor:
        """[blocks, S, S + K - 1]: whether a key is in the row, or column, of the query's window."""
        start = torch.arange(blocks, device=device)[:, None] * BLOCK
        key = start + torch.arange(BLOCK + length - 1, device=device) - length // 2
        query = start + torch.arange(BLOCK, device=device)
        near = (key[:, None] - query[:, :, None]).abs() <= length // 2
        if window.border != "mask":
            return near
        # A query that only fills up its block may see nothing; let it see all, its result is cut off.
        return near & (((key >= 0) & (key < n))[:, None] | (query >= n)[:, :, None])

    rows, columns = seen(down, height, window.rows), seen(across, width, window.columns)
    both = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    i, j = torch.arange(down * BLOCK, device=device)[:, None], torch.arange(across, device=device)
    return (
        runs(BLOCK, BLOCK, BLOCK),
        runs(BLOCK + window.rows - 1, BLOCK + window.columns - 1, RUN),
        ((i // BLOCK * across + j) * BLOCK + i % BLOCK).flatten(),
        ~both.flatten(4, 5).flatten(2, 3).flatten(0, 1),
    )


def by_place(rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """[N, d // 2, Kh] and [N, d - d // 2, Kw] -> [N, S^2, d, h + w]: r of every row and column of the halo, by place.

    Rows and columns outside the window get 0.
    """
    rows, columns = (
        torch.stack([F.pad(rel, (i, BLOCK - 1 - i)) for i in range(BLOCK)], dim=1) for rel in (rel_row, rel_col)
    )
    h, w = rows.shape[3], columns.shape[3]
    rows = F.pad(rows, (0, w, 0, rel_col.shape[1]))[:, :, None].expand(-1, -1, BLOCK, -1, -1)
    columns = F.pad(columns, (h, 0, rel_row.shape[1], 0))[:, None].expand(-1, BLOCK, -1, -1, -1)
    return (rows + columns).flatten(1, 2)


def spread(h: int, w: int, like: Tensor) -> Tensor:
    """[h + w, h w]: 1 where a key of the halo lies in the row or in the column, in the dtype of `like`."""
    rows = torch.eye(h, dtype=like.dtype, device=like.device).repeat_interleave(w, dim=1)
    columns = torch.eye(w, dtype=like.dtype, device=like.device).repeat(1, h)
    return torch.cat([rows, columns])


def by_offset(rel: Tensor, queries: slice, keys: slice) -> Tensor:
    """[N, d', K] -> [N, queries, d', keys]: r of every key row, or column, for each of queries; 0 outside of K."""
    count = keys.stop - keys.start
    offset = torch.arange(keys.start, keys.stop, device=rel.device) - torch.arange(
        queries.start, queries.stop, device=rel.device
    ).unsqueeze(1)
    # One gather: a slice for each query would be most of an exported graph.
    return F.pad(rel, (count, count))[..., offset + count + rel.shape[2] // 2].movedim(2, 1)


def run_in_bands(
    window: Window, masks: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None,
    rel_col: Tensor | None, softmax: Softmax,
) -> Tensor:  # fmt: skip
    """y [B, C, H, W], one band of rows after the other."""
    _, _, height, width = sizes(q)
    q, k, v = (t.unflatten(1, (window.heads, -1)).permute(0, 1, 3, 4, 2) for t in (q, k, v))
    k, v, nonfinite = _windows.finite(k, v, dim=4)
    in_bands, y = bands(window, height, width), []
    assert in_bands is not None
    every = slice(0, width)
    columns = None if rel_col is None else by_offset(rel_col, every, every)
    for (rows, keys), mask in zip(in_bands, masks, strict=True):
        band = q[:, :, rows]
        logits = band.flatten(2, 3) @ k[:, :, keys].flatten(2, 3).transpose(2, 3)
        if rel_row is not None and columns is not None:
            half = rel_row.shape[1]
            by_row = band[..., :half] @ by_offset(rel_row, rows, keys)
            by_column = (band[..., half:].transpose(2, 3) @ columns).transpose(2, 3)
            places = torch.cat([by_row, by_column], dim=4).flatten(2, 3)
            logits = logits + places @ spread(keys.stop - keys.start, width, q)
        y.append(softmax(logits, mask) @ v[:, :, keys].flatten(2, 3))
    whole = torch.cat(y, dim=2).unflatten(2, (height, width))
    return _windows.add_nonfinite(window, whole, nonfinite, dim=4).permute(0, 1, 4, 2, 3).flatten(1, 2)


def run(
    window: Window,
    at: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    softmax: Softmax = _windows.softmax,
) -> Tensor:
    """y [B, C, H, W] of q, k, v [B, C, H, W] with the tables of their size."""
    batch, channels, height, width = sizes(q)
    if bands(window, height, width):
        return run_in_bands(window, at, q, k, v, rel_row, rel_col, softmax)
    queries, keys, pixels, masks = at
    heads, d = window.heads, channels // window.heads
    h, w = BLOCK + window.rows - 1, BLOCK + window.columns - 1
    below, right = -height % BLOCK, -width % BLOCK
    left, _, top, _ = window.padding

    def in_runs(t: Tensor, run: int, padding: tuple[int, int, int, int]) -> Tensor:
        if not all(isinstance(n, int) and n == 0 for n in padding):  # a runtime would copy for nothing
            t = F.pad(t, (0, 0, *padding))
        return t.reshape(batch, heads, t.shape[2] * t.shape[3] // run, run * d)

    def gather(t: Tensor, runs: Tensor, size: int) -> Tensor:
        return t.index_select(2, runs.flatten()).reshape(batch, heads, runs.shape[0], size, d)

    q, k, v = (t.unflatten(1, (heads, d)).permute(0, 1, 3, 4, 2) for t in (q, k, v))
    k, v, nonfinite = _windows.finite(k, v, dim=4)
    blocks = in_runs(q, BLOCK, (0, right, 0, below))
    k_runs, v_runs = (in_runs(t, RUN, (left, right + left, top, below + top)) for t in (k, v))
    places = by_place(rel_row, rel_col) if rel_row is not None and rel_col is not None else None
    ones = spread(h, w, q) if places is not None else None

    def attended(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        block, k_halo, v_halo = (
            gather(blocks, queries, BLOCK**2),
            gather(k_runs, keys, h * w),
            gather(v_runs, keys, h * w),
        )
        logits = block @ k_halo.transpose(3, 4)
        if places is not None and ones is not None:
            logits = logits + (block.transpose(2, 3) @ places).transpose(2, 3) @ ones
        return softmax(logits, mask) @ v_halo

    parts = min(PARTS, masks.shape[0]) if isinstance(height, int) and isinstance(width, int) else 1
    split = (t.tensor_split(parts) for t in (queries, keys, masks)) if parts > 1 else ((queries,), (keys,), (masks,))
    y = torch.cat([attended(*part) for part in zip(*split, strict=True)], dim=2)
    y = y.reshape(batch, heads, masks.shape[0] * BLOCK, BLOCK * d).index_select(2, pixels)
    y = y.reshape(batch, heads, height + below, width + right, d)[:, :, :height, :width]
    y = _windows.add_nonfinite(window, y, nonfinite, dim=4)
    return y.permute(0, 1, 4, 2, 3).flatten(1, 2)


CORE = Core(run, tables, open_sizes=False)
EXPORTED = replace(CORE, run=partial(run, softmax=_windows.softmax_without_underflow))
IMPL = local_attention("gathered", "blocks by gathers of runs of pixels, matrix products and a mask", core=CORE)
ONNX = _onnx.exported_attention(
    "onnx", "the gathered formulation in ONNX Runtime, for one size", EXPORTED, exports="gathered"
)
ONNX_DYNAMIC = _onnx.exported_attention(
    "onnx_dynamic",
    "the gathered formulation in ONNX Runtime, one model for every size",
    EXPORTED,
    exports="gathered",
    dynamic=True,
)
