"""Is it right? An implementation against its op's float64 reference, with a derived error budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, Op, Tensors, arranged, dtype_of, leaves, output_names, random_tensors, step
from sasa_bench.timing.budgets import budgets, max_abs, root_mean_square
from sasa_bench.timing.far import Far, far_from_a_pixel


@dataclass(frozen=True)
class Reference:
    """What is expected of an op on a case.

    tensors   inputs and parameters, float64 on the CPU, representable in the dtype of the case
    grad_y    the gradient that arrives at y [B, C, H, W], or None for forward
    expected  name of each output -> its float64 value
    budgets   name of each output -> largest absolute error allowed
    rms       name of each output -> root mean square error allowed; none where only the largest is bounded
    far       a pixel that becomes very large, and where y must stay; None where there is nothing to see
    """

    case: Case
    tensors: Tensors
    grad_y: Tensor | None
    expected: dict[str, Tensor]
    budgets: dict[str, float]
    rms: dict[str, float] = field(default_factory=dict)
    far: Far | None = None


@dataclass(frozen=True)
class Verdict:
    """max_abs_err and err_budget of the output nearest to, or furthest over, its budget; no reason where all hold."""

    max_abs_err: float
    err_budget: float
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


CHANCE = 4.0
"""Gradients of a network that are off by less than so many times their budget are checked again with other inputs:
which relus change sides is luck. Of 90 checks of right networks 2 were off by more than once, 1.04 and 1.6 times."""

LARGE = 4.0
"""Images that a forward pass is checked on after the timing are so many times as large: logits grow with the square, so
that the softmax is saturated. Gradients of a saturated softmax are nothing but rounding, whoever computes them."""


def compute_reference(op: Op, case: Case, seed: int) -> Reference:
    """What the reference gives in float64 on fresh random input, and how far an implementation may be from it."""
    reference = _compute_reference(op, case, random_tensors(op, case, seed), seed)
    y = reference.expected.get("y")
    return reference if y is None else replace(reference, far=far_from_a_pixel(op, case, reference.tensors, y, seed))


def recompute_reference(op: Op, first: Reference, seed: int) -> Reference:
    """What is expected of the parameters of `first` with other images, LARGE times as large for one layer's forward.

    Of a backward pass alone, whose graph is recorded once: with another gradient of y.
    """
    case, tensors = first.case, dict(first.tensors)
    if case.mode != "backward":
        other = random_tensors(op, case, seed)
        one_layer = case.scope != "network" and case.stem == "none"
        scale = LARGE if one_layer and case.mode == "forward" else 1.0
        tensors |= {name: t * scale for name, t in other.items() if name in IMAGES}
    return _compute_reference(op, case, tensors, seed)


def _compute_reference(op: Op, case: Case, tensors: Tensors, seed: int) -> Reference:
    seed_of_gradient = None if case.mode == "forward" else seed
    exact = _reference(op, case, tensors, torch.float64, seed_of_gradient)
    grad_y = exact.pop("grad_y", None)
    plain = _reference(op, case, tensors, dtype_of(case), seed_of_gradient)

    def rerun(moved: Tensors, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return _reference(op, case, moved, dtype, seed_of_gradient)

    terms = case.channels * case.kernel_size**2 if op.name == "convolution" else 0
    largest, rms = budgets(case, tensors, exact, plain, rerun, seed, terms)
    return Reference(case, tensors, grad_y, exact, largest, rms)


def compare(reference: Reference, outputs: tuple[Tensor, ...]) -> Verdict:
    """The verdict on `outputs`, in the order of ops.output_names.

    A NaN or a wrong shape is an infinite error; so is a tensor of a class of its own, which may not be computed yet.
    """
    worst: tuple[float, float, float, str] | None = None
    for (name, expected), output in zip(reference.expected.items(), outputs, strict=True):
        budget = reference.budgets[name]
        if type(output) not in (Tensor, Parameter):
            return Verdict(math.inf, budget, f"{name} is a {type(output).__name__}, expected a torch.Tensor")
        if output.shape != expected.shape:
            reason = f"{name} has shape {list(output.shape)}, expected {list(expected.shape)}"
            return Verdict(math.inf, budget, reason)
        difference = output.detach().to(expected.device).double() - expected
        error, usual = max_abs(difference), root_mean_square(difference)
        reason = f"{name} is off by {error:.2e}, {_times(error, budget):.3g} times its budget of {budget:.2e}"
        excess = _times(error, budget)
        if math.isinf(error) and (missing := int(output.isnan().sum())):
            reason = f"{name} holds NaN in {missing} of its {output.numel()} values"
        if name in reference.rms and _times(usual, reference.rms[name]) > max(1.0, excess):
            excess = _times(usual, reference.rms[name])
            reason = (
                f"{name} is off by {usual:.2e} in the root mean square, {excess:.3g} times its budget of "
                f"{reference.rms[name]:.2e}"
            )
        if worst is None or excess > worst[0]:
            worst = (excess, error, budget, reason)
    assert worst is not None
    excess, error, budget, reason = worst
    return Verdict(error, budget, "" if excess <= 1 else reason)


def by_chance(reference: Reference, verdict: Verdict) -> bool:
    """Whether a verdict of wrong may be the luck of these inputs, see budgets.kinks."""
    jumps = reference.case.stem != "none" and reference.case.mode != "forward"
    return jumps and not verdict.ok and verdict.max_abs_err < CHANCE * verdict.err_budget


def _times(error: float, budget: float) -> float:
    return error / budget if budget else (0.0 if error == 0 else math.inf)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch fills every uninitialised tensor with NaN, so that an output never written is seen."""
    before = torch.get_deterministic_debug_mode()
    # Not use_deterministic_algorithms, which also tells Inductor: to import that takes every worker 1.6 s.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def gradient_of_output(case: Case, y: Tensor, seed: int) -> Tensor:
    """A random gradient of the shape of `y`, rounded to the dtype of the case, in the dtype of `y`."""
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype_of(case))
    return arranged(grad, case).to(device=y.device, dtype=y.dtype)


def _reference(op: Op, case: Case, tensors: Tensors, dtype: torch.dtype, seed: int | None) -> dict[str, Tensor]:
    inputs = leaves(tensors, case, dtype)
    if seed is None:
        with torch.no_grad():
            return {"y": op.reference(case, inputs)}
    y = op.reference(case, inputs)
    grad_y = gradient_of_output(case, y, seed)
    outputs = step(case.with_(mode="training"), lambda: y, inputs, grad_y)()
    named = dict(zip(output_names(case.with_(mode="training"), tensors), outputs, strict=True))
    return {name: named[name] for name in output_names(case, tensors)} | {"grad_y": grad_y}
