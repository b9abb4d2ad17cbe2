"""Launches of the CUDA kernels: the forward, the three kernels of the backward, and the choice of tunables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda.kernels import Function, Tunables, candidates, expression, last_sum, source

SUM_COLUMNS, SUM_ROWS = 32, 8


class Runtime(Protocol):
    """What the host side needs from a device; `nvrtc.Runtime` is the real one. `plans` remembers what was chosen."""

    @property
    def plans(self) -> dict[Any, Any]: ...

    def launch(
        self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]
    ) -> None: ...

    def choose(
        self, source: str, key: str, candidates: Sequence[Tunables], run: Callable[[Tunables], None]
    ) -> Tunables: ...


@dataclass(frozen=True)
class Plan:
    """One kernel for one shape: the template instance, its grid and block, and the tunables behind them."""

    expression: str
    grid: int
    block: int
    tiles: int


def _function(q: Tensor, rel_row: Tensor | None, kernel_size: int, heads: int, zero_border: bool) -> Function:
    return Function(q.dtype, kernel_size, q.shape[1] // heads, rel_row is not None, zero_border)


def plan_for(kernel: str, function: Function, shape: Sequence[int], heads: int, tunables: Tunables) -> Plan:
    """The launch of a kernel for maps of a shape [B, C, H, W]."""
    tiles = tunables.tiles(shape[2], shape[3])
    grid = ceil(shape[0] * heads / tunables.images) * tiles
    return Plan(expression(kernel, function, tunables), grid, tunables.threads, tiles)


def _chosen(
    runtime: Runtime, kernel: str, function: Function, shape: Sequence[int], heads: int, run: Callable[[Plan], None]
) -> Plan:
    images = 1 << (shape[0] * heads - 1).bit_length()
    key = f"{kernel} {function} {shape[2]}x{shape[3]} images<={images}"

    def try_out(tunables: Tunables) -> None:
        run(plan_for(kernel, function, shape, heads, tunables))

    found = runtime.choose(source(), key, candidates(kernel, function, shape[2], shape[3]), try_out)
    return plan_for(kernel, function, shape, heads, found)


def _planar(*maps: Tensor) -> tuple[list[Tensor], int]:
    """The maps with dense planes and batch entries at one distance, and that distance in elements.

    Thirds of a projection are such maps; others are copied.
    """
    batch, channels, height, width = maps[0].shape
    strides = maps[0].stride()
    step = strides[0] if batch > 1 else channels * height * width

    def fits(t: Tensor) -> bool:
        return _has_dense_planes(t) and (batch == 1 or t.stride(0) == step)

    if 0 <= step < 2**31 and fits(maps[0]) and all(t.stride() == strides or fits(t) for t in maps[1:]):
        return list(maps), step
    return [t.contiguous() for t in maps], channels * height * width


def _has_dense_planes(t: Tensor) -> bool:
    _, channels, height, width = t.shape
    _, plane, row, pixel = t.stride()
    return (channels == 1 or plane == height * width) and (height == 1 or row == width) and (width == 1 or pixel == 1)


def _remember(runtime: Runtime, key: Any, plans: Any) -> None:
    # While a graph is captured nothing is measured, so what was taken then is not what to keep.
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        runtime.plans[key] = plans


def forward_arguments(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor, log2_sum: Tensor,
    heads: int,
) -> list[nvrtc.Argument]:  # fmt: skip
    """What a launch of the kernel `forward` takes."""
    batch, _, height, width = q.shape
    (q, k, v), stride = _planar(q, k, v)
    return [q, k, v, rel_row, rel_col, y, log2_sum, height, width, heads, batch * heads, stride]


def run_forward(
    runtime: Runtime, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor,
    log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> None:  # fmt: skip
    """Fills y [B, C, H, W] and the base-2 logarithm of the softmax's denominator [B, heads, H, W] in float32."""
    shape = q.shape
    arguments = forward_arguments(q, k, v, rel_row, rel_col, y, log2_sum, heads)

    def run(plan: Plan) -> None:
        runtime.launch(source(), plan.expression, plan.grid, plan.block, arguments)

    key = ("forward", q.dtype, shape, kernel_size, heads, rel_row is None, zero_border)
    plan = runtime.plans.get(key)
    if plan is None:
        function = _function(q, rel_row, kernel_size, heads, zero_border)
        plan = _chosen(runtime, "forward", function, shape, heads, run)
        _remember(runtime, key, plan)
    run(plan)


def run_backward(
    runtime: Runtime, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None,
    y: Tensor, log2_sum: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, drel_row: Tensor | None, drel_col: Tensor | None,
    kernel_size: int, heads: int, zero_border: bool,
) -> None:  # fmt: skip
    """Fills the gradients of q, k, v [B, C, H, W], and of rel_row and rel_col, if any.

    dq, dk and dv have dense planes and batch entries at one distance, as thirds of one tensor have.
    """
    shape = q.shape
    batch, channels, height, width = shape
    (q, k, v), stride = _planar(q, k, v)
    y, dy = y.contiguous(), dy.contiguous()
    delta = torch.empty_like(log2_sum)
    position = rel_row is not None
    column_logits = log2_sum.new_empty((batch, heads, kernel_size, height, width)) if position else None
    sizes = (height, width, heads, batch * heads, stride, dq.stride(0), 0)

    def run_queries(plan: Plan, partials: Tensor | None) -> None:
        arguments = [q, k, v, rel_row, rel_col, y, dy, log2_sum, dq, delta, column_logits, partials, *sizes]
        runtime.launch(source(), plan.expression, plan.grid, plan.block, arguments)

    def run_keys(plan: Plan) -> None:
        arguments = [q, k, v, rel_row, rel_col, dy, log2_sum, delta, column_logits, dk, dv, *sizes]
        runtime.launch(source(), plan.expression, plan.grid, plan.block, arguments)

    def shares(plan: Plan) -> Tensor | None:
        if not position:
            return None
        return log2_sum.new_empty((batch * heads * plan.tiles, channels // heads, kernel_size))

    key = ("backward", q.dtype, shape, kernel_size, heads, rel_row is None, zero_border)
    plans = runtime.plans.get(key)
    if plans is None:
        function = _function(q, rel_row, kernel_size, heads, zero_border)
        most = [plan_for("backward_queries", function, shape, heads, tunables)
                for tunables in candidates("backward_queries", function, height, width)]  # fmt: skip
        room = shares(max(most, key=lambda plan: plan.tiles))
        by_queries = _chosen(runtime, "backward_queries", function, shape, heads, lambda plan: run_queries(plan, room))
        run_queries(by_queries, shares(by_queries))
        by_keys = _chosen(runtime, "backward_keys", function, shape, heads, run_keys)
        plans = by_queries, by_keys
        _remember(runtime, key, plans)
    by_queries, by_keys = plans
    partials = shares(by_queries)
    run_queries(by_queries, partials)
    run_keys(by_keys)
    if position:
        width = channels // heads
        runtime.launch(
            source(),
            last_sum(q.dtype, kernel_size, width),
            heads * ceil(width * kernel_size / SUM_COLUMNS),
            SUM_COLUMNS * SUM_ROWS,
            [partials, drel_row, drel_col, batch, heads, by_queries.tiles],
        )
