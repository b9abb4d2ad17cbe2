"""Is it right? An implementation against its op's float64 reference, with a derived error budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, Op, Tensors, leaves, output_names, random_tensors, step

BUDGET_FACTOR = 8.0
"""How many times the error of the plain reference, run in the dtype of the case, an implementation may be off: a
different order of summation is allowed, a different function is not."""


KINK_STEP = 32 * 2.0**-23
"""By what share of itself every tensor of a network moves to see how far its gradients jump, or by a rounding of the
dtype if that is more. Enough that relus of every depth change sides, so that the jump is not a matter of luck."""

KINK_FACTOR = 2.0
"""The jump is the maximum over many scalars, known from one draw; an implementation's, another draw, may be larger.
With a factor of 1, one of 36 right gradients of a ResNet was called wrong, by 1.16 times."""


FEW_SCALARS, DRAWS = 1 << 14, 4
"""With few scalars the plain error may be small by luck: it is at least what rounding the input anew does."""


@dataclass(frozen=True)
class Oracle:
    """What is expected of an op on a case.

    tensors   inputs and parameters, float64 on the CPU, representable in the dtype of the case
    grad_y    the gradient that arrives at y [B, C, H, W], or None for forward
    expected  name of each output -> its float64 value
    budgets   name of each output -> largest absolute error allowed
    """

    case: Case
    tensors: Tensors
    grad_y: Tensor | None
    expected: dict[str, Tensor]
    budgets: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """max_abs_err and err_budget of the output that comes worst off; reason is empty when all are within budget."""

    max_abs_err: float
    err_budget: float
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


def consult(op: Op, case: Case, seed: int) -> Oracle:
    """Run the reference in float64 and in the dtype of the case on fresh random input.

    A budget also allows for adding the K x K terms of a window one after the other in float32, whose error is at most
    K^2 roundings (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); the reference adds them in
    blocks. The gradient of a parameter adds terms of every pixel of the batch; of terms with random signs, added in
    float32 one after the other, the errors grow as the square root of their number (Higham and Mary, A New Approach to
    Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019).
    """
    tensors = random_tensors(op, case, seed)
    dtype = getattr(torch, case.dtype)
    seed_of_gradient = None if case.mode == "forward" else seed
    exact = _reference(op, case, tensors, torch.float64, seed_of_gradient)
    grad_y = exact.pop("grad_y", None)
    plain = _reference(op, case, tensors, dtype, seed_of_gradient)
    plain.pop("grad_y", None)
    rounding = torch.finfo(dtype).eps
    in_window = case.kernel_size**2
    over_pixels = math.sqrt(case.batch * case.height * case.width)
    budgets = {}
    kinks = {}
    if case.scope == "network" and case.mode != "forward":
        kinks = _kinks(op, case, tensors, exact, seed)
    errors = {name: _max_abs(plain[name].double() - value) for name, value in exact.items()}
    if case.scope != "network" and case.batch * case.channels * case.height * case.width < FEW_SCALARS:
        for draw in range(1, DRAWS):
            moved = _rounded_anew(tensors, rounding, seed + draw)
            for name, value in _reference(op, case, moved, torch.float64, seed_of_gradient).items():
                if name != "grad_y":
                    errors[name] = max(errors[name], _max_abs(value - exact[name]))
    for name, value in exact.items():
        error = errors[name]
        roundings = in_window + (over_pixels if name.removeprefix("gradient of ") not in (*IMAGES, "y") else 0.0)
        in_sequence = roundings * torch.finfo(torch.float32).eps
        budgets[name] = BUDGET_FACTOR * max(error, rounding * _max_abs(value)) + in_sequence * _max_abs(value)
        budgets[name] = max(budgets[name], kinks.get(name, 0.0))
    return Oracle(case, tensors, grad_y, exact, budgets)


def _rounded_anew(tensors: Tensors, rounding: float, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t * (1 + rounding * torch.randn(t.shape, generator=generator, dtype=t.dtype))
        for name, t in tensors.items()
    }


def compare(oracle: Oracle, outputs: tuple[Tensor, ...]) -> Verdict:
    """The verdict on `outputs`, in the order of ops.output_names. A NaN or a wrong shape is an infinite error."""
    worst: tuple[float, float, float, str] | None = None
    for (name, expected), output in zip(oracle.expected.items(), outputs, strict=True):
        if output.shape != expected.shape:
            reason = f"{name} has shape {list(output.shape)}, expected {list(expected.shape)}"
            return Verdict(float("inf"), oracle.budgets[name], reason)
        error = _max_abs(output.detach().to(expected.device).double() - expected)
        budget = oracle.budgets[name]
        excess = error / budget if budget else (0.0 if error == 0 else float("inf"))
        if worst is None or excess > worst[0]:
            worst = (excess, error, budget, name)
    assert worst is not None
    excess, error, budget, name = worst
    reason = "" if excess <= 1 else f"{name} is off by {error:.2e}, {excess:.3g} times its budget of {budget:.2e}"
    return Verdict(error, budget, reason)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch fills every uninitialised tensor with NaN, so that an output never written is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gradient_of_output(case: Case, y: Tensor, seed: int) -> Tensor:
    """A random gradient of the shape of `y`, rounded to the dtype of the case, in the dtype of `y`."""
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(getattr(torch, case.dtype))
    return grad.to(device=y.device, dtype=y.dtype)


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


def _kinks(op: Op, case: Case, tensors: Tensors, exact: dict[str, Tensor], seed: int) -> dict[str, float]:
    """How far each gradient of a network jumps when every tensor moves by KINK_STEP, and at least as far as the median.

    A relu whose input is within rounding of 0 passes or stops its gradient by chance, and one such relu moves all
    gradients below it. Which ones do so differs from run to run; the median is for gradients above all that did here.
    """
    distance = max(KINK_STEP, torch.finfo(getattr(torch, case.dtype)).eps)
    generator = torch.Generator().manual_seed(seed + 2)
    moved = {
        name: t * (1 + distance * torch.randn(t.shape, generator=generator, dtype=t.dtype))
        for name, t in tensors.items()
    }
    jumped = _reference(op, case, moved, torch.float64, seed)
    sizes = {name: _max_abs(value) for name, value in exact.items() if name != "y"}
    jumps = {name: _max_abs(jumped[name] - exact[name]) for name in sizes}
    middle = statistics.median(jumps[name] / size for name, size in sizes.items() if size)
    return {name: KINK_FACTOR * max(jump, middle * sizes[name]) for name, jump in jumps.items()}


def _max_abs(t: Tensor) -> float:
    if not t.numel():
        return 0.0
    largest = t.abs().max().item()
    return float("inf") if largest != largest else largest
