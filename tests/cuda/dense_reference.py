"""Local self-attention written down plainly, and what an implementation may differ from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How many times as much as plain PyTorch in the same dtype a kernel may err. In float32 it sums in its own
# order and recomputes the weights from a rounded denominator; in 16 bits plain PyTorch rounds every step and
# the kernel only the results.
BUDGET_FACTOR = {torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}
TENSOR_CORE_FACTOR = BUDGET_FACTOR | {torch.float16: 4.0, torch.bfloat16: 4.0}
"""Kernels on tensor cores also round the weights and their gradients to 16 bits, between two products."""
NAMES = ("y", "dq", "dk", "dv", "drel_row", "drel_col")


@dataclass(frozen=True)
class Problem:
    """One input: sizes, dtype, positions, border."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    head_width: int = 8
    height: int = 7
    width: int = 7
    kernel_size: int = 7
    position: bool = True
    zero_border: bool = False

    def __str__(self) -> str:
        return (
            f"{str(self.dtype).removeprefix('torch.')}-b{self.batch}-h{self.heads}-d{self.head_width}-"
            f"{self.height}x{self.width}-k{self.kernel_size}-{'relative' if self.position else 'none'}-"
            f"{'zero' if self.zero_border else 'mask'}"
        )

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], Tensor]:
        """(q, k, v, rel_row, rel_col) and dy, random with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.heads * self.head_width, self.height, self.width)
        q, k, v, dy = (torch.randn(shape, generator=generator) for _ in range(4))
        made: list[Tensor | None] = [q, k, v, None, None]
        if self.position:
            half = self.head_width // 2
            made[3] = torch.randn((self.heads, half, self.kernel_size), generator=generator)
            made[4] = torch.randn((self.heads, self.head_width - half, self.kernel_size), generator=generator)
        made[0] = q * self.head_width**-0.5
        return [None if t is None else t.to(device, self.dtype) for t in made], dy.to(device, self.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> Tensor:  # fmt: skip
    """y [B, C, H, W] by dense attention over the padded image, every other position masked out."""
    batch, channels, height, width = q.shape
    radius, head_width = kernel_size // 2, channels // heads
    high, wide = height + 2 * radius, width + 2 * radius
    padded_k, padded_v = (torch.nn.functional.pad(t, [radius] * 4) for t in (k, v))
    queries = q.reshape(batch, heads, head_width, height * width).transpose(2, 3)
    padded = (batch, heads, head_width, high * wide)
    keys, values = (t.reshape(padded).transpose(2, 3) for t in (padded_k, padded_v))

    # Offsets of every padded position from every query, as window coordinates.
    a = torch.arange(high)[None, :, None] - torch.arange(height)[:, None, None]
    b = torch.arange(wide)[None, None, :] - torch.arange(width)[:, None, None]
    a = a.view(height, 1, high, 1).expand(height, width, high, wide).reshape(height * width, high * wide)
    b = b.view(1, width, 1, wide).expand(height, width, high, wide).reshape(height * width, high * wide)
    takes_part = (a >= 0) & (a < kernel_size) & (b >= 0) & (b < kernel_size)
    if not zero_border:
        inside = torch.zeros(high, wide, dtype=torch.bool)
        inside[radius : radius + height, radius : radius + width] = True
        takes_part = takes_part & inside.reshape(1, -1)

    logits = queries @ keys.transpose(2, 3)
    if rel_row is not None and rel_col is not None:
        half = head_width // 2
        row = queries[..., :half] @ rel_row
        column = queries[..., half:] @ rel_col
        spread = (batch, heads, height * width, high * wide)
        logits = logits + row.gather(3, a.clamp(0, kernel_size - 1).expand(spread))
        logits = logits + column.gather(3, b.clamp(0, kernel_size - 1).expand(spread))
    weights = logits.masked_fill(~takes_part, float("-inf")).softmax(3)
    return (weights @ values).transpose(2, 3).reshape(batch, channels, height, width)


def mirrored(tensors: Sequence[Tensor | None], axes: tuple[int, ...]) -> list[Tensor | None]:
    """Maps and embeddings (q, k, v, rel_row, rel_col) as they are in the image mirrored along rows (2), columns (3)."""
    *maps, rel_row, rel_col = tensors
    mirrored_maps = [None if t is None else t.flip(axes) for t in maps]
    row = rel_row.flip(2) if rel_row is not None and 2 in axes else rel_row
    return [*mirrored_maps, row, rel_col.flip(2) if rel_col is not None and 3 in axes else rel_col]


def results(problem: Problem, dtype: torch.dtype, axes: tuple[int, ...] = ()) -> list[Tensor]:
    """y and all gradients, in the order of NAMES, computed in `dtype` from the problem's own inputs.

    With `axes` the image is mirrored before and the results after: the same numbers, summed in another order.
    """
    inputs, dy = problem.inputs()
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in mirrored(inputs, axes)]
    y = attention(*leaves, problem.kernel_size, problem.heads, problem.zero_border)  # type: ignore[arg-type]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.numel()]
    gradients = iter(torch.autograd.grad(y, wanted, dy.to(dtype).flip(axes)))
    made = [None if t is None else next(gradients) if t.numel() else torch.zeros_like(t) for t in leaves]
    return [y.detach().flip(axes), *(t for t in mirrored(made, axes) if t is not None)]


def errors(
    problem: Problem, got: list[Tensor], factors: Mapping[torch.dtype, float] = BUDGET_FACTOR
) -> dict[str, tuple[float, float]]:
    """For y and each gradient: the largest absolute error against float64, and the largest that is allowed.

    Allowed is the factor of the dtype times the error of the plain reference in the problem's dtype, which is taken to
    be at least the rounding of the largest value. In which order the matrix products of this machine sum decides
    by luck how well they do on a small problem, so the reference errs as much as the worst of four orders.
    """
    exact = results(problem, torch.float64)
    plain = [results(problem, problem.dtype, axes) for axes in ((), (2,), (3,), (2, 3))]
    found = {}
    for name, truth, value, *rough in zip(NAMES, exact, got, *plain, strict=False):
        if not truth.numel():
            continue
        error = (value.double().cpu() - truth).abs().max().item()
        rounding = torch.finfo(problem.dtype).eps / 2 * truth.abs().max().item()
        rough_error = max(rounding, *((t.double() - truth).abs().max().item() for t in rough))
        found[name] = (error if error == error else float("inf"), factors[problem.dtype] * rough_error)
    return found


def failures(problem: Problem, got: list[Tensor], factors: Mapping[torch.dtype, float] = BUDGET_FACTOR) -> list[str]:
    """A line for each result beyond its budget."""
    return [
        f"{problem}: {name} is off by {error:.3g}, allowed are {budget:.3g}"
        for name, (error, budget) in errors(problem, got, factors).items()
        if not error <= budget
    ]
