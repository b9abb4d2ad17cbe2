"""Launches of the Triton kernels: sizes of blocks, layouts, and the forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST = 16
"""The smallest side of a matrix in ``tl.dot``."""
WIDEST_HEAD = 128
MOST_SLOTS = 128
"""Halo positions that are multiplied at a time, so that their logits stay in registers."""
MOST_BLOCKS = 7
"""Blocks of queries that a program goes down; it reads the position embeddings once."""


def allows_tf32() -> bool:
    """Whether products of float32 on CUDA may round to tf32, by torch's own switch, which is off by default."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):  # torch 2.9; it also holds what was set by the older switch
        return bool(switch.fp32_precision == "tf32")
    return bool(switch.allow_tf32)


@dataclass(frozen=True)
class Function:
    """What the kernels compute: element type, window, channels of a head, relative position or none, border.

    `tf32`: float32 is rounded to tf32 for tensor cores; without it the FMA units multiply float32.
    """

    dtype: torch.dtype
    kernel_size: int
    head_width: int
    position: bool
    zero_border: bool
    tf32: bool = False

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return (
            f"{dtype} k={self.kernel_size} d={self.head_width} "
            f"{'relative' if self.position else 'none'} {'zero' if self.zero_border else 'mask'}"
        )


@dataclass(frozen=True)
class Tunables:
    """Rows and columns of a block of queries (or keys), warps that share it, depth of the pipeline of loads."""

    rows: int
    columns: int
    warps: int
    stages: int


CHOICES = (Tunables(2, 8, 1, 2), Tunables(2, 8, 1, 1), Tunables(4, 4, 1, 2), Tunables(4, 8, 2, 2), Tunables(8, 8, 4, 2))
"""What is measured on a device; the first is taken unmeasured."""

Choose = Callable[[str, Function, "torch.Size", Callable[[Tunables], None]], Tunables]
"""(kernel, function, shape of q, run) -> the tunables to use; `run` launches the kernel with given ones."""


def unmeasured(kernel: str, function: Function, shape: torch.Size, run: Callable[[Tunables], None]) -> Tunables:
    """The default tunables."""
    return CHOICES[0]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def constants(kernel: str, function: Function, height: int, tunables: Tunables) -> dict[str, Any]:
    """The compile-time arguments of "forward", "backward_queries" or "backward_keys" by name."""
    columns = max(LEAST, _power(tunables.columns + function.kernel_size - 1))
    found: dict[str, Any] = {
        "K": function.kernel_size,
        "WIDTH": function.head_width,
        "POSITION": function.position,
        "ZERO_BORDER": function.zero_border,
        "PRECISION": "tf32" if function.tf32 else "ieee",
        "CHANNELS": max(LEAST, _power(function.head_width)),
        "WINDOW": max(LEAST, _power(function.kernel_size)),
        "QUERY_ROWS": tunables.rows,
        "QUERY_COLUMNS": tunables.columns,
        "COLUMNS": columns,
    }
    if kernel != "backward_keys":
        halo = _power(tunables.rows + function.kernel_size - 1)
        found["ROWS"] = min(halo, max(1, _slots(kernel, function, halo * columns) // columns))
        down = ceil(height / tunables.rows)
        found["BLOCKS"] = ceil(down / ceil(down / MOST_BLOCKS))
    return found


def _operand(function: Function) -> int:
    """Channels of a tile, in 16 bits; a tf32 operand takes four registers where one of 16 bits takes one."""
    return max(LEAST, _power(function.head_width)) * (4 if function.dtype == torch.float32 else 1)


def _slots(kernel: str, function: Function, all_at_once: int) -> int:
    """Halo positions at a time, by the counted spills (tests/cuda/triton_resources.csv)."""
    if kernel == "forward":
        wide = MOST_SLOTS // 2 if function.dtype == torch.float32 else MOST_SLOTS // 4
        return MOST_SLOTS if _operand(function) <= 2 * LEAST else wide
    if _operand(function) <= LEAST:
        return MOST_SLOTS if all_at_once <= MOST_SLOTS else MOST_SLOTS // 2
    return MOST_SLOTS // 2 if _operand(function) <= 2 * LEAST else MOST_SLOTS // 4


def programs(height: int, width: int, tunables: Tunables, named: dict[str, Any]) -> int:
    """Programs that cover one head of one image."""
    return ceil(width / tunables.columns) * ceil(ceil(height / tunables.rows) / named.get("BLOCKS", 1))


def strides(t: Tensor) -> tuple[int, int]:
    """(image, pixel) stride of a pixel-major map [B, C, H, W]; torch gives sides of 1 strides without meaning."""
    _, channels, height, width = t.shape
    pixel = t.stride(3) if width > 1 else t.stride(2) if height > 1 else channels
    return t.stride(0), pixel


def is_pixel_major(t: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, and rows follow each other."""
    _, channels, height, width = t.shape
    rows_follow = height == 1 or width == 1 or t.stride(2) == width * t.stride(3)
    return rows_follow and (channels == 1 or t.stride(1) == 1)


def pixel_major(*maps: Tensor) -> list[Tensor]:
    """The maps where they are pixel-major with the same strides; else those that are not dense are copied."""
    if all(is_pixel_major(t) and strides(t) == strides(maps[0]) for t in maps):
        return list(maps)
    _, channels, height, width = maps[0].shape
    dense = (channels * height * width, channels)
    return [
        t
        if is_pixel_major(t) and strides(t) == dense
        else torch.empty_like(t, memory_format=torch.channels_last).copy_(t)
        for t in maps
    ]


class Launcher:
    """Runs the kernels of a module: sasa_bench.impls.triton.kernels, or in tests the same source interpreted."""

    def __init__(self, kernels: ModuleType, choose: Choose = unmeasured) -> None:
        self.kernels = kernels
        self.choose = choose

    def launch(
        self, kernel: str, function: Function, shape: torch.Size, tunables: Tunables, arguments: list[Any]
    ) -> None:
        batch, channels, height, width = shape
        named = constants(kernel, function, height, tunables)
        heads = channels // function.head_width
        grid = (programs(height, width, tunables, named) * heads, batch)
        getattr(self.kernels, kernel)[grid](*arguments, **named, num_warps=tunables.warps, num_stages=tunables.stages)


def _function(q: Tensor, rel_row: Tensor | None, kernel_size: int, heads: int, zero_border: bool) -> Function:
    tf32 = q.dtype == torch.float32 and allows_tf32()
    return Function(q.dtype, kernel_size, q.shape[1] // heads, rel_row is not None, zero_border, tf32)


def run_forward(
    launcher: Launcher, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor,
    log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> None:  # fmt: skip
    """Fills y [B, C, H, W] and the base-2 logarithm of the softmax's denominator [B, heads, H, W] in float32."""
    shape = q.shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    q, k, v = pixel_major(q, k, v)
    arguments = [q, k, v, rel_row, rel_col, y, log2_sum, *shape[2:], heads, *strides(q), *strides(y)]

    def run(tunables: Tunables) -> None:
        launcher.launch("forward", function, shape, tunables, arguments)

    run(launcher.choose("forward", function, shape, run))


def run_backward(
    launcher: Launcher, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None,
    y: Tensor, log2_sum: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, drel_row: Tensor | None, drel_col: Tensor | None,
    kernel_size: int, heads: int, zero_border: bool,
) -> None:  # fmt: skip
    """Fills the gradients of q, k, v [B, C, H, W], which lie in the same way, and of rel_row and rel_col, if any."""
    shape = q.shape
    batch, _, height, width = shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    q, k, v = pixel_major(q, k, v)
    y, dy = pixel_major(y, dy)
    delta = torch.empty_like(log2_sum)
    sizes = (height, width, heads, *strides(q), *strides(y), *strides(dq))

    def sums(tunables: Tunables) -> Tensor | None:
        """Room for the shares of the gradients of rel_row and rel_col, [2, B, heads, programs, CHANNELS, WINDOW]."""
        if rel_row is None:
            return None
        named = constants("backward_queries", function, height, tunables)
        count = programs(height, width, tunables, named)
        return log2_sum.new_empty((2, batch, heads, count, named["CHANNELS"], named["WINDOW"]))

    def run_queries(tunables: Tunables, shares: Tensor | None) -> None:
        pair = (None, None) if shares is None else (shares[0], shares[1])
        arguments = [q, k, v, rel_row, rel_col, y, dy, log2_sum, dq, delta, *pair, *sizes]
        launcher.launch("backward_queries", function, shape, tunables, arguments)

    def run_keys(tunables: Tunables) -> None:
        arguments = [q, k, v, rel_row, rel_col, dy, log2_sum, delta, dk, dv, *sizes]
        launcher.launch("backward_keys", function, shape, tunables, arguments)

    rooms: dict[Tunables, Tensor | None] = {}

    def try_queries(tunables: Tunables) -> None:
        if tunables not in rooms:
            rooms[tunables] = sums(tunables)
        run_queries(tunables, rooms[tunables])

    by_queries = launcher.choose("backward_queries", function, shape, try_queries)
    shares = sums(by_queries)
    run_queries(by_queries, shares)
    run_keys(launcher.choose("backward_keys", function, shape, run_keys))
    if shares is not None and drel_row is not None and drel_col is not None:
        half = function.head_width // 2
        total = shares.sum((1, 3))
        drel_row.copy_(total[0, :, :half, :kernel_size])
        drel_col.copy_(total[1, :, half : function.head_width, :kernel_size])
