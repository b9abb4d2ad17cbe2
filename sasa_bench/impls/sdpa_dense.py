"""Local attention as attention over the whole map with a dense bias that holds the window and q . r."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.impls import Core, Window, _compiled, _windows, local_attention
from sasa_bench.networks.core import sizes
from sasa_bench.results.format import size

COPIES = {"forward": 2, "backward": 5, "training": 5}
"""How many tensors of the size of the bias a pass holds at most, rounded up from measured peaks of 1.3 and 4.5: for a
bias that needs a gradient torch writes out logits, weights and the gradients of both."""


def _margins(window: Window) -> tuple[int, int]:
    """At border "zero" the keys are those of the padded map."""
    return window.radii if window.border == "zero" else (0, 0)


def tables(window: Window, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[H W, keys down] and [H W, keys across]: steps from query to key within the window, and 0 or -inf outside it."""
    device = like.device

    def side(n: int, length: int, margin: int) -> tuple[Tensor, Tensor]:
        keys = torch.arange(n + 2 * margin, device=device) - margin
        steps = keys - torch.arange(n, device=device)[:, None] + length // 2
        outside = (steps < 0) | (steps >= length)
        none = torch.zeros(outside.shape, device=device, dtype=like.dtype).masked_fill(outside, -torch.inf)
        return steps.clamp(0, length - 1), none

    margins = _margins(window)
    row_steps, no_row = side(height, window.rows, margins[0])
    column_steps, no_column = side(width, window.columns, margins[1])

    def of_row(t: Tensor) -> Tensor:
        return t[:, None].expand(height, width, -1).flatten(0, 1)

    def of_column(t: Tensor) -> Tensor:
        return t[None].expand(height, width, -1).flatten(0, 1)

    return of_row(row_steps), of_row(no_row), of_column(column_steps), of_column(no_column)


def run(
    window: Window,
    at: tuple[Tensor, Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
) -> Tensor:
    """One scaled_dot_product_attention of H W queries over all keys, unscaled, with an additive bias.

    The bias of query (i, j) and key (a, b) is R_ij,a + S_ij,b: R is q . r_{a-i} of the row half of a head's channels, S
    is q . r_{b-j} of the rest, and each is -inf where a or b is outside the window.
    """
    row_steps, no_row, column_steps, no_column = at
    batch, channels, height, width = sizes(q)
    d = channels // window.heads
    down, across = _margins(window)
    padding = (across, across, down, down)

    def heads(t: Tensor) -> Tensor:
        # Without contiguous() torch falls back to the kernel that writes all logits to memory.
        return t.flatten(3).transpose(2, 3).contiguous()

    q, k, v = (t.unflatten(1, (window.heads, d)) for t in (q, k, v))
    k, v, nonfinite = _windows.finite(k, v, dim=2)
    queries = heads(q)
    keys, values = (heads(F.pad(t, padding)) for t in (k, v))
    if rel_row is not None and rel_col is not None:
        by_row, by_column = queries[..., : d // 2] @ rel_row, queries[..., d // 2 :] @ rel_col
        by_row = by_row.gather(3, row_steps.expand(batch, window.heads, -1, -1)) + no_row
        by_column = by_column.gather(3, column_steps.expand(batch, window.heads, -1, -1)) + no_column
        bias = (by_row[..., None] + by_column[..., None, :]).flatten(3)
    else:
        bias = (no_row[:, :, None] + no_column[:, None, :]).flatten(1)
    if isinstance(batch, int) and batch == 0:
        y = (queries @ keys.transpose(2, 3) + bias) @ values  # torch would leave the embeddings without gradients
    else:
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
    y = y.transpose(2, 3).reshape(batch, window.heads, d, height, width)
    return _windows.add_nonfinite(window, y, nonfinite, dim=2).flatten(1, 2)


@cache
def _memory(device: str) -> int:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _too_large(
    batch: int, window: Window, height: int, width: int, relative: bool, bytes_each: int, mode: str, device: str
) -> str | None:
    down, across = _margins(window)
    queries, keys = height * width, (height + 2 * down) * (width + 2 * across)
    copies, biases = COPIES[mode], (batch, window.heads) if relative else (1, 1)
    needed = biases[0] * biases[1] * queries * keys * bytes_each * copies
    if needed <= _memory(device) / 2:
        return None
    factors = f"{biases[0]} images x {biases[1]} heads x {queries} queries x {keys} keys x {bytes_each} bytes"
    return (
        f"a dense bias of {factors}, held {copies} times, is {size(needed)}, more than half of the "
        f"{size(_memory(device))} of this machine: give a smaller batch or resolution"
    )


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    batch, _, height, width = sizes(x)
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return None
    mode = "training" if torch.is_grad_enabled() else "forward"
    return _too_large(batch, window, height, width, relative, x.element_size(), mode, x.device.type)


def _supports(case: Case) -> str | None:
    relative, bytes_each = case.position == "relative", DTYPE_BYTES[case.dtype]
    return _too_large(
        case.batch, Window.of(case), case.height, case.width, relative, bytes_each, case.mode, case.device
    )


CORE = Core(run, tables, refuses=_refuses, transforms=False)
IMPL = local_attention(
    "sdpa_dense",
    "scaled_dot_product_attention over the whole map, window and positions as a dense bias",
    core=CORE,
    supports=_supports,
)
COMPILED = _compiled.compiled_attention(
    "compiled_sdpa_dense", "the dense formulation through torch.compile", CORE, _supports
)
