"""How far from the float64 reference an output may be: one named function a rule, each with its source.

The budget of an output is `BUDGET_FACTOR` times the larger of the reference's own error in the dtype of the case, with
`errors_of_luck`, and one rounding of its largest value, plus `summation_error`; the gradients of a network get `kinks`
where that is more. It bounds the largest error, and a second one by the same rules the root mean square: a factor of
1.05 on every scalar hides below the largest error of 16 bits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, Tensors, dtype_of

BUDGET_FACTOR = 8.0
"""How many times the error of the plain reference, run in the dtype of the case, an implementation may be off: a
different order of summation is allowed, a different function is not."""

TF32_EPS = 2.0**-10
"""One step of tf32 at 1: a significand of 10 bits besides the leading one."""

KINK_STEP = 32 * 2.0**-23
"""By what share of itself every tensor of a network moves to see how far its gradients jump, or by a rounding of the
dtype if that is more. Enough that relus of every depth change sides, so that the jump is not a matter of luck."""

KINK_FACTOR, KINK_DRAWS = 2.0, 3
"""The jump is the maximum over many scalars, known from few draws; an implementation's, another draw, may be larger.
With a factor of 1 and one draw, one of 36 right gradients of a ResNet was called wrong, by 1.16 times. With a factor of
2 and one draw, one gradient in 18 checks of a ResNet-50 was, by 1.25 times: in the last block a single relu changes the
gradient, and in most draws none changes sides."""

FEW_SCALARS, DRAWS = 1 << 14, 4
"""With few scalars the plain error may be small by luck: it is at least what rounding the input again does, and the
plain error on those inputs. The latter tells where a gradient is 0 but for rounding, such as that of rel_row on a map
of one row."""

RMS_FACTOR = 4.0
"""The same for the root mean square, which is no matter of luck: half of the factor is enough."""

MANY_SCALARS = 1 << 10
"""Of an output with values for each pixel, so that its root mean square is no matter of luck. The gradient of a
parameter is a sum over all pixels and may cancel to nothing but rounding: rel_row has one row on such a map."""

RMS_ROUNDING = 0.25
"""Root mean square of rounding, in roundings of a value: it is uniform within half of one, which gives 0.29 at the
least and, over a binade, 0.2 on average."""

Size = Callable[[Tensor], float]
"""Of an error: the largest magnitude, or the root mean square."""

Outputs = dict[str, Tensor]
Budgets = dict[str, float]
"""Name of each output -> error allowed."""

Rerun = Callable[..., Outputs]
"""The reference on other tensors, in float64 or a dtype that follows: name of each output -> its value."""


def budgets(
    case: Case, tensors: Tensors, exact: Outputs, plain: Outputs, rerun: Rerun, seed: int, terms: int = 0
) -> list[Budgets]:
    """The largest absolute errors allowed, and the root mean square ones; always finite.

    `exact` are the outputs of the reference in float64, `plain` those in the dtype of the case; for `terms` see
    `summation_error`. The root mean square of
    a backward pass of a network or stem, which has `kinks`, is not bounded.
    """
    rounding = TF32_EPS if case.dtype == "tf32" else torch.finfo(dtype_of(case)).eps
    errors = [_less(plain, exact), *errors_of_luck(case, rounding, tensors, exact, rerun, seed)]
    largest = _bounds(case, exact, errors, BUDGET_FACTOR, rounding, max_abs, terms)
    if case.stem != "none" and case.mode != "forward":
        jumps = kinks(rounding, tensors, exact, rerun, seed)
        return [{name: max(budget, jumps.get(name, 0.0)) for name, budget in largest.items()}, {}]
    many = {n: value for n, value in exact.items() if value.numel() >= MANY_SCALARS and _of_pixels(n)}
    return [largest, _bounds(case, many, errors, RMS_FACTOR, RMS_ROUNDING * rounding, root_mean_square, terms)]


def _of_pixels(name: str) -> bool:
    return name.removeprefix("gradient of ") in (*IMAGES, "y")


def _bounds(
    case: Case, exact: Outputs, errors: Sequence[Outputs], factor: float, rounding: float, size: Size, terms: int
) -> Budgets:
    found = {}
    for name, value in exact.items():
        whole = size(value)
        error = max(size(each[name]) for each in errors)
        # Where the plain reference overflows its dtype, the output itself bounds the error: a budget is finite.
        error = error if math.isfinite(error) else whole
        found[name] = factor * max(error, rounding * whole) + summation_error(case, name, terms) * whole
    return found


def _less(found: Outputs, exact: Outputs) -> Outputs:
    return {name: found[name].double() - value for name, value in exact.items()}


def errors_of_luck(
    case: Case, rounding: float, tensors: Tensors, exact: Outputs, rerun: Rerun, seed: int
) -> list[Outputs]:
    """By how much the outputs move when every tensor is rounded again at random, and what the reference in the dtype of
    the case is off by there; DRAWS - 1 draws, none where scalars are many.

    Of tf32 one of the former, always: the plain reference runs on the CPU, in float32.
    """
    if case.dtype == "tf32":
        return [_less(rerun(_moved(tensors, rounding, seed + 1)), exact)]
    if case.scope == "network" or case.batch * case.channels * case.height * case.width >= FEW_SCALARS:
        return []
    found, kind = [], dtype_of(case)
    for draw in range(1, DRAWS):
        moved = {n: t.to(kind).double() for n, t in _moved(tensors, rounding, seed + draw).items()}
        there = rerun(moved)
        found += [_less(there, exact), _less(rerun(moved, kind), there)]
    return found


def summation_error(case: Case, name: str, terms: int = 0) -> float:
    """Error of adding in float32 one after the other what the reference adds in blocks, as a share of the output.

    At most K^2 roundings for the K x K terms of a window (Higham, Accuracy and Stability of Numerical Algorithms,
    section 4.2). The gradient of a parameter adds terms of every pixel of the batch, a convolution `terms` of every
    channel and place of the window; of terms with random signs the errors grow as the square root of their number
    (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019).
    """
    roundings = max(float(case.kernel_size**2), math.sqrt(terms))
    if not _of_pixels(name):
        roundings += math.sqrt(case.batch * case.height * case.width)
    return roundings * torch.finfo(torch.float32).eps


def kinks(rounding: float, tensors: Tensors, exact: Outputs, rerun: Rerun, seed: int) -> Budgets:
    """How far each gradient of a network or stem jumps in the worst of KINK_DRAWS draws, and at least the median.

    A draw moves every tensor by KINK_STEP.
    A relu whose input is within rounding of 0 passes or stops its gradient by chance, and one such relu moves all
    gradients below it; a max pool does the same where two pixels are within rounding of each other. Which ones do so
    differs from run to run; the median is for gradients above all that did here.
    """
    jumped = [rerun(_moved(tensors, max(KINK_STEP, rounding), seed + draw)) for draw in range(2, 2 + KINK_DRAWS)]
    sizes = {name: max_abs(value) for name, value in exact.items() if name != "y"}
    jumps = {name: max(max_abs(one[name] - exact[name]) for one in jumped) for name in sizes}
    middle = statistics.median(jumps[name] / size for name, size in sizes.items() if size)
    return {name: KINK_FACTOR * max(jump, middle * sizes[name]) for name, jump in jumps.items()}


def max_abs(t: Tensor) -> float:
    """The largest magnitude in `t`; infinite where a NaN is among them, 0 for no scalars."""
    if not t.numel():
        return 0.0
    largest = t.abs().max().item()
    return float("inf") if largest != largest else largest


def root_mean_square(t: Tensor) -> float:
    """The root of the mean square of `t`; infinite where a NaN is among them, 0 for no scalars."""
    if not t.numel():
        return 0.0
    mean = t.double().square().mean().item()
    return float("inf") if mean != mean else float(mean**0.5)


def _moved(tensors: Tensors, share: float, seed: int) -> Tensors:
    """Every scalar moved by `share` of itself times a draw from the normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t * (1 + share * torch.randn(t.shape, generator=generator, dtype=t.dtype)) for name, t in tensors.items()
    }
