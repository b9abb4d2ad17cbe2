"""Launches of the CUDA kernels: the forward, the three kernels of the backward, and the choice of tunables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda.kernels import ELEMENTS, Function, Tunables, candidates, expression, source

SUM_COLUMNS, SUM_ROWS = 32, 8


class Runtime(Protocol):
    """What the host side needs from a device; `nvrtc.Runtime` is the real one."""

    def launch(
        self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]
    ) -> None: ...

    def choose(self, key: str, candidates: Sequence[Tunables], run: Callable[[Tunables], None]) -> Tunables: ...


def _tuned(
    runtime: Runtime,
    kernel: str,
    function: Function,
    shape: torch.Size,
    heads: int,
    run: Callable[[Tunables], None],
) -> Tunables:
    images = 1 << (shape[0] * heads - 1).bit_length()
    key = f"{kernel} {function} {shape[2]}x{shape[3]} images<={images}"
    return runtime.choose(key, candidates(kernel, function, shape[2], shape[3]), run)


def _function(q: Tensor, rel_row: Tensor | None, kernel_size: int, heads: int, zero_border: bool) -> Function:
    return Function(q.dtype, kernel_size, q.shape[1] // heads, rel_row is not None, zero_border)


def run_forward(
    runtime: Runtime, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None,
    kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, C, H, W] and the base-2 logarithm of the softmax's denominator [B, heads, H, W] in float32."""
    batch, _, height, width = q.shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    y = torch.empty_like(q)
    log2_sum = q.new_empty((batch, heads, height, width), dtype=torch.float32)
    if q.numel() == 0:
        return y, log2_sum

    def run(tunables: Tunables) -> None:
        runtime.launch(
            source(),
            expression("forward", function, tunables),
            batch * heads * tunables.tiles(height, width),
            tunables.threads,
            [q, k, v, rel_row, rel_col, y, log2_sum, height, width, heads],
        )

    run(_tuned(runtime, "forward", function, q.shape, heads, run))
    return y, log2_sum


def run_backward(
    runtime: Runtime, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None,
    rel_col: Tensor | None, y: Tensor, log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, rel_row and rel_col; the last two are empty without positions."""
    batch, _, height, width = q.shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if rel_row is None or rel_col is None:
        drel_row, drel_col = q.new_empty(0), q.new_empty(0)
    else:
        drel_row, drel_col = torch.empty_like(rel_row), torch.empty_like(rel_col)
    if q.numel() == 0:
        return dq, dk, dv, drel_row.zero_(), drel_col.zero_()
    inputs = (q, k, v, rel_row, rel_col)
    delta = torch.empty_like(log2_sum)
    column_logits = partials = None
    if function.position:
        column_logits = log2_sum.new_empty((batch, heads, kernel_size, height, width))

    def run_queries(tunables: Tunables) -> None:
        nonlocal partials
        blocks = batch * heads * tunables.tiles(height, width)
        if function.position:
            partials = log2_sum.new_empty((blocks, function.head_width, kernel_size))
        runtime.launch(
            source(),
            expression("backward_queries", function, tunables),
            blocks,
            tunables.threads,
            [*inputs, y, dy, log2_sum, dq, delta, column_logits, partials, height, width, heads, 0],
        )

    def run_keys(tunables: Tunables) -> None:
        runtime.launch(
            source(),
            expression("backward_keys", function, tunables),
            batch * heads * tunables.tiles(height, width),
            tunables.threads,
            [*inputs, dy, log2_sum, delta, column_logits, dk, dv, height, width, heads, 0],
        )

    by_queries = _tuned(runtime, "backward_queries", function, q.shape, heads, run_queries)
    run_queries(by_queries)
    run_keys(_tuned(runtime, "backward_keys", function, q.shape, heads, run_keys))
    if partials is not None:
        runtime.launch(
            source(),
            f"sum_positions<{ELEMENTS[q.dtype]}, {kernel_size}, {function.head_width}>",
            heads * ceil(function.head_width * kernel_size / SUM_COLUMNS),
            SUM_COLUMNS * SUM_ROWS,
            [partials, drel_row, drel_col, batch, heads, by_queries.tiles(height, width)],
        )
    return dq, dk, dv, drel_row, drel_col
