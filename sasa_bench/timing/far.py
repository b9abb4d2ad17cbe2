"""Does a query see what its window does not hold? One pixel becomes very large, and what does not depend on it stays.

Logits of that pixel exceed any mask of -1e4 or -1e9: a formulation that masks with a finite number is found out, though
it agrees with the reference on logits of unit variance. All other logits stay as they are, so the budgets do too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.network import holds
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import IMAGES, Tensors
from sasa_bench.timing.budgets import max_abs

LARGE = {"float16": 2.0**9}
"""How many times as large the pixel becomes: a logit is the product of two pixels, and must not overflow."""

LARGE_ELSE = 2.0**40

OPS = ("local_attention", "neighborhood_attention", "per_channel_attention", "halo_attention", "criss_cross")
"""Softmaxes over some of the pixels. Not convolutions: fast ones transform tiles, where a large pixel costs the others
their digits."""

UNCHANGED = 1e-9
"""By what share of its largest value y may differ in float64 where it does not depend on the pixel."""


@dataclass(frozen=True)
class Far:
    """Which pixel becomes how many times as large, and the pixels [B, 1, H, W] of y that do not depend on it."""

    row: int
    column: int
    factor: float
    unchanged: Tensor


def far_from_a_pixel(op: Op, case: Case, tensors: Tensors, y: Tensor, seed: int) -> Far | None:
    """Where the reference's y of these float64 tensors does not depend on a random pixel.

    None where that is nowhere, for other ops than OPS, and for networks.
    """
    if holds(case) or op.name not in OPS:
        return None
    draw = random.Random(seed)
    row, column, factor = draw.randrange(case.height), draw.randrange(case.width), LARGE.get(case.dtype, LARGE_ELSE)
    moved = {name: t.clone() for name, t in tensors.items()}
    _scale(moved, row, column, factor)
    with torch.no_grad():
        change = (op.reference(case, moved) - y).abs().amax(1, keepdim=True)
    unchanged = change <= UNCHANGED * max_abs(y)
    return Far(row, column, factor, unchanged) if unchanged.any() else None


def error_far_away(
    far: Far, y: Tensor, budget: float, run: Callable[[], tuple[Tensor, ...]], tensors: Tensors
) -> tuple[float, str]:
    """How far the first output of `run`, which reads `tensors`, is off y where that does not depend on the pixel.

    And a sentence that says so where it exceeds the budget, else "".
    """
    images = {name: t.detach().clone() for name, t in tensors.items() if name in IMAGES}
    _scale(tensors, far.row, far.column, far.factor)
    try:
        found = run()[0].detach().cpu().double()
    finally:
        with torch.no_grad():
            for name, values in images.items():
                tensors[name].copy_(values)
    error = max_abs((found - y)[far.unchanged.expand_as(y)])
    if error <= budget:
        return error, ""
    return error, (
        f"y is off by {error:.2e}, {error / budget:.3g} times its budget of {budget:.2e}, where no window holds the "
        f"pixel in row {far.row}, column {far.column}, when that is {far.factor:.0e} times as large: mask with -inf"
    )


def _scale(tensors: Tensors, row: int, column: int, factor: float) -> None:
    with torch.no_grad():
        for name in IMAGES:
            if name in tensors:
                tensors[name][:, :, row, column] *= factor
