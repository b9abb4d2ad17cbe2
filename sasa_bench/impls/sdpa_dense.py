"""Local attention as attention over the whole map with a dense bias that holds the window and q . r."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.impls import Attend, local_attention

COPIES = {"forward": 2, "backward": 5, "training": 5}
"""How many tensors of the size of the bias a pass holds at most, rounded up from measured peaks of 1.3 and 4.5: for a
bias that needs a gradient torch writes out logits, weights and the gradients of both."""


def attend(case: Case) -> Attend:
    """One scaled_dot_product_attention of H W queries over all keys, unscaled, with an additive bias.

    The bias of query (i, j) and key (a, b) is R_ij,a + S_ij,b: R is q . r_{a-i} of the row half of a head's channels, S
    is q . r_{b-j} of the rest, and each is -inf where a or b is outside the window. At border "zero" the keys are those
    of the padded map.
    """
    radius, window, half = case.radius, case.kernel_size, case.head_dim // 2
    margin = radius if case.border == "zero" else 0
    dtype = getattr(torch, case.dtype)

    def side(n: int) -> tuple[Tensor, Tensor]:
        keys = torch.arange(-margin, n + margin, device=case.device)
        steps = keys - torch.arange(n, device=case.device)[:, None] + radius
        outside = (steps < 0) | (steps >= window)
        none = torch.zeros(outside.shape, device=case.device, dtype=dtype).masked_fill(outside, -torch.inf)
        return steps.clamp(0, window - 1), none

    (row_steps, no_row), (column_steps, no_column) = side(case.height), side(case.width)
    pixels = (case.height, case.width)
    row_steps, no_row = (t[:, None].expand(*pixels, -1).flatten(0, 1) for t in (row_steps, no_row))
    column_steps, no_column = (t[None].expand(*pixels, -1).flatten(0, 1) for t in (column_steps, no_column))
    plain = None
    if case.position != "relative":
        plain = (no_row[:, :, None] + no_column[:, None, :]).flatten(1)

    def heads(t: Tensor) -> Tensor:
        # Without contiguous() torch falls back to the kernel that writes all logits to memory.
        return t.unflatten(1, (case.heads, case.head_dim)).flatten(3).transpose(2, 3).contiguous()

    def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        shape = q.shape
        q, k, v = heads(q), heads(F.pad(k, (margin,) * 4)), heads(F.pad(v, (margin,) * 4))
        bias = plain
        if rel_row is not None and rel_col is not None:
            by_row, by_column = q[..., :half] @ rel_row, q[..., half:] @ rel_col
            by_row = by_row.gather(3, row_steps.expand(*q.shape[:2], -1, -1)) + no_row
            by_column = by_column.gather(3, column_steps.expand(*q.shape[:2], -1, -1)) + no_column
            bias = (by_row[..., None] + by_column[..., None, :]).flatten(3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return y.transpose(2, 3).reshape(shape)

    return core


def _supports(case: Case) -> str | None:
    margin = 2 * case.radius if case.border == "zero" else 0
    queries, keys = case.height * case.width, (case.height + margin) * (case.width + margin)
    copies, bytes_each = COPIES[case.mode], DTYPE_BYTES[case.dtype]
    biases = (case.batch, case.heads) if case.position == "relative" else (1, 1)
    needed = biases[0] * biases[1] * queries * keys * bytes_each * copies
    there = psutil.virtual_memory().total
    if case.device == "cuda" and torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
    if needed <= there / 2:
        return None
    factors = f"{biases[0]} images x {biases[1]} heads x {queries} queries x {keys} keys x {bytes_each} bytes"
    return (
        f"a dense bias of {factors}, held {copies} times, is {needed / (1 << 30):.3g} GiB, more than half of the "
        f"{there / (1 << 30):.3g} GiB of this machine: give a smaller batch or resolution"
    )


IMPL = local_attention(
    "sdpa_dense",
    "scaled_dot_product_attention over the whole map, window and positions as a dense bias",
    attend,
    supports=_supports,
)
