"""How far from the float64 reference an output may be: one named function a rule, each with its source.

The budget of an output is `BUDGET_FACTOR` times the larger of `plain_error` and one rounding of its largest value, plus
`summation_error`; the gradients of a network get `kinks` where that is more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, Tensors

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
"""With few scalars the plain error may be small by luck: it is at least what rounding the input again does."""

Outputs = dict[str, Tensor]
Rerun = Callable[[Tensors], Outputs]
"""The reference in float64 on other tensors: name of each output -> its value."""


def budgets(case: Case, tensors: Tensors, exact: Outputs, plain: Outputs, rerun: Rerun, seed: int) -> dict[str, float]:
    """Name of each output -> largest absolute error allowed.

    `exact` are the outputs of the reference in float64, `plain` those in the dtype of the case.
    """
    rounding = torch.finfo(getattr(torch, case.dtype)).eps
    errors = plain_error(exact, plain)
    if case.scope != "network" and case.batch * case.channels * case.height * case.width < FEW_SCALARS:
        again = rounding_again(rounding, tensors, exact, rerun, seed)
        errors = {name: max(error, again[name]) for name, error in errors.items()}
    jumps: Mapping[str, float] = {}
    if case.stem != "none" and case.mode != "forward":
        jumps = kinks(rounding, tensors, exact, rerun, seed)
    found = {}
    for name, value in exact.items():
        size = max_abs(value)
        budget = BUDGET_FACTOR * max(errors[name], rounding * size) + summation_error(case, name) * size
        found[name] = max(budget, jumps.get(name, 0.0))
    return found


def plain_error(exact: Outputs, plain: Outputs) -> dict[str, float]:
    """What the reference itself is off by when it runs in the dtype of the case: max |plain - exact| of each output."""
    return {name: max_abs(plain[name].double() - value) for name, value in exact.items()}


def rounding_again(rounding: float, tensors: Tensors, exact: Outputs, rerun: Rerun, seed: int) -> dict[str, float]:
    """How far each output moves when every tensor is rounded again at random, the worst of DRAWS - 1 draws."""
    errors = dict.fromkeys(exact, 0.0)
    for draw in range(1, DRAWS):
        moved = rerun(_moved(tensors, rounding, seed + draw))
        errors = {name: max(error, max_abs(moved[name] - exact[name])) for name, error in errors.items()}
    return errors


def summation_error(case: Case, name: str) -> float:
    """Error of adding in float32 one after the other what the reference adds in blocks, as a share of the output.

    At most K^2 roundings for the K x K terms of a window (Higham, Accuracy and Stability of Numerical Algorithms,
    section 4.2). The gradient of a parameter adds terms of every pixel of the batch; of terms with random signs the
    errors grow as the square root of their number (Higham and Mary, A New Approach to Probabilistic Rounding Error
    Analysis, SIAM J. Sci. Comput. 41(5), 2019).
    """
    roundings = float(case.kernel_size**2)
    if name.removeprefix("gradient of ") not in (*IMAGES, "y"):
        roundings += math.sqrt(case.batch * case.height * case.width)
    return roundings * torch.finfo(torch.float32).eps


def kinks(rounding: float, tensors: Tensors, exact: Outputs, rerun: Rerun, seed: int) -> dict[str, float]:
    """How far each gradient of a network or stem jumps when every tensor moves by KINK_STEP, and at least the median.

    A relu whose input is within rounding of 0 passes or stops its gradient by chance, and one such relu moves all
    gradients below it; a max pool does the same where two pixels are within rounding of each other. Which ones do so
    differs from run to run; the median is for gradients above all that did here.
    """
    jumped = rerun(_moved(tensors, max(KINK_STEP, rounding), seed + 2))
    sizes = {name: max_abs(value) for name, value in exact.items() if name != "y"}
    jumps = {name: max_abs(jumped[name] - exact[name]) for name in sizes}
    middle = statistics.median(jumps[name] / size for name, size in sizes.items() if size)
    return {name: KINK_FACTOR * max(jump, middle * sizes[name]) for name, jump in jumps.items()}


def max_abs(t: Tensor) -> float:
    """The largest magnitude in `t`; infinite where a NaN is among them, 0 for no scalars."""
    if not t.numel():
        return 0.0
    largest = t.abs().max().item()
    return float("inf") if largest != largest else largest


def _moved(tensors: Tensors, share: float, seed: int) -> Tensors:
    """Every scalar moved by `share` of itself times a draw from the normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t * (1 + share * torch.randn(t.shape, generator=generator, dtype=t.dtype)) for name, t in tensors.items()
    }
