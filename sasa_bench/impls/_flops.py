"""What torch.utils.flop_counter counts for the operators of this package: the work that the cost model states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.networks.layers import AttentionStem

Shape = Sequence[int]


def _core(q: Shape, relative: bool, kernel_size: int, heads: int) -> int:
    batch, channels, height, width = q
    if not batch:
        return 0
    case = Case(
        scope="core",
        batch=batch,
        channels=channels,
        heads=heads,
        kernel_size=kernel_size,
        resolution=f"{height}x{width}",
        position="relative" if relative else "none",
    )
    return ops.get("local_attention").cost(case).flops


def forward(
    q: Shape,
    k: Shape,
    v: Shape,
    row: Shape | None,
    col: Shape | None,
    kernel_size: int,
    heads: int,
    *_rest: Any,
    **_: Any,
) -> int:
    """Of (q, k, v, rel_row, rel_col, kernel_size, heads, ...) -> y."""
    return _core(q, row is not None, kernel_size, heads)


def backward(dy: Shape, *arguments: Any, **_: Any) -> int:
    """Of (dy, q, k, v, rel_row, rel_col, saved..., kernel_size, heads, zero_border): twice the forward pass."""
    return 2 * _core(dy, arguments[3] is not None, arguments[-3], arguments[-2])


def forward_qkv(
    qkv: Shape, row: Shape | None, col: Shape | None, kernel_size: int, heads: int, *_: Any, **__: Any
) -> int:
    """Of (qkv, rel_row, rel_col, kernel_size, heads, ...) -> y."""
    return _core((qkv[0], qkv[1] // 3, *qkv[2:]), row is not None, kernel_size, heads)


def backward_qkv(dy: Shape, *arguments: Any, **_: Any) -> int:
    """Of (dy, qkv, rel_row, rel_col, saved..., kernel_size, heads, zero_border): twice the forward pass."""
    return 2 * _core(dy, arguments[1] is not None, arguments[-3], arguments[-2])


def layer(
    x: Shape, w: Shape, row: Shape | None, col: Shape | None, kernel_size: int, heads: int, *_rest: Any, **_: Any
) -> int:
    """Of (x, w_qkv, rel_row, rel_col, kernel_size, heads, ...) -> y, the projections with it."""
    batch, height, width = x[0], x[2], x[3]
    return 2 * w[0] * w[1] * batch * height * width + _core(
        (batch, w[0] // 3, height, width), row is not None, kernel_size, heads
    )


def layer_backward(dy: Shape, x: Shape, w: Shape, row: Shape | None, col: Shape | None, *rest: Any, **_: Any) -> int:
    """Of (dy, x, w_qkv, rel_row, rel_col, saved..., kernel_size, heads, zero_border): twice the forward pass."""
    return 2 * layer(x, w, row, col, rest[-3], rest[-2])


def layer_packed(
    x: Shape, w: Shape, row: Shape | None, col: Shape | None, bias: Shape | None, channels: int, kernel_size: int,
    heads: int, *_rest: Any, **_: Any,
) -> int:  # fmt: skip
    """Of (x, packed w_qkv, rel_row, rel_col, bias, channels, kernel_size, heads, ...) -> y, the projections with it."""
    return layer(x, (3 * channels, x[1]), row, col, kernel_size, heads)


def stem(x: Shape, form: Shape, values: Shape, *_rest: Any, **_: Any) -> int:
    """Of (x [B, 3, H, W], form, values [16, C, 3] or [C, 3, 4, 4], ...) -> the attention of a stem."""
    by_convolution = len(values) == 4
    found = AttentionStem(values[0 if by_convolution else 1], "conv_values" if by_convolution else "stand_alone")
    return x[0] * found.flops((x[1], x[2], x[3]))


def stem_backward(gradient: Shape, *arguments: Any, **_: Any) -> int:
    """Of (gradient, offset, slope, x, form, values, ...): twice the forward pass."""
    return 2 * stem(*arguments[2:5])


def count(name: str, formula: Any) -> None:
    """Count operator `name` of the namespace sasa_bench by `formula`, from now on.

    A counter copies all formulas when it starts. One that runs while the operator is loaded gets this one too.
    """
    operator = getattr(torch.ops.sasa_bench, name)
    register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if counter := getattr(mode, "counter", None):
            counter.flop_registry[operator] = flop_registry[operator]
