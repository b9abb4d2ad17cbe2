"""One implementation on one case: built, checked against the reference, ready to be timed."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.ops.tensors import IMAGES, Tensors, arranged, leaves, random_tensors, step
from sasa_bench.results.columns import MEASURED, misfit
from sasa_bench.results.fields import MOST, first_line, printable
from sasa_bench.timing import switches
from sasa_bench.timing.check import (
    Reference,
    Verdict,
    by_chance,
    compare,
    compute_reference,
    gradient_of_output,
    poisoned_memory,
    recompute_reference,
)
from sasa_bench.timing.far import error_far_away
from sasa_bench.timing.proof import Feed, feed
from sasa_bench.timing.timers import Step

References = dict[tuple[Any, ...], Reference]
"""What is expected of (op, contiguous case), and of (op, contiguous case, N) with other images; filled on demand,
so that implementations of one op share it."""


def key_of(op: str, computed: Case) -> tuple[str, Case]:
    """The key of a case in `References`: its values do not depend on the memory format."""
    return op, computed.with_(memory_format="contiguous")


REPEATED = (
    "the output was the same for another input: every call has to compute it from the current values of its tensors"
)


@dataclass(frozen=True)
class Prepared:
    """An implementation that is ready to be timed, or the reason why not.

    row   the fields of a Record so far
    step  makes one call; None where the row is not ok
    feed  makes what changes between samples; asked once, before the first sample
    """

    row: dict[str, Any]
    step: Step | None
    feed: Callable[[], Feed] | None = None


def prepare(
    name: str, case: Case, seed: int, stage: Callable[[str], None], references: References, check: bool = True
) -> Prepared:
    """Build an implementation and check one call of it on random input; without `check` only make sure that it runs.

    `stage` is told "check" and "build" before each begins. Any exception becomes a row with status "error".
    """
    row: dict[str, Any] = {"status": "ok", "reason": ""}
    try:
        impl = impls.get(name)
        computed = impl.computes(case)
        cost = asdict(impl.op.cost(computed))
        if max(cost.values()) >= MOST:
            return Prepared(row | {"status": "skipped", "reason": f"too large: {cost['flops']:.2g} FLOPs a call"}, None)
        row |= cost
        reason = switches.unfit(case) or impl.supports(case) or no_device(case) or impl.missing()
        if reason:
            return Prepared(row | {"status": "skipped", "reason": printable(str(reason))}, None)
        if not check:
            return Prepared(row, _unchecked(impl, computed, seed, stage))
        stage("check")
        key = key_of(impl.op.name, computed)
        if key not in references:
            references[key] = compute_reference(impl.op, key[1], seed)
        reference = references[key]
        tensors = leaves(reference.tensors, computed)
        first = tensors[next(iter(tensors))]
        grad_y = None if reference.grad_y is None else arranged(reference.grad_y, computed).to(first)

        def expected(turn: int) -> Reference:
            if (*key, turn) not in references:
                references[*key, turn] = recompute_reference(impl.op, reference, seed + turn)
            return references[*key, turn]

        def other_values() -> Feed:
            return feed(computed, tensors, grad_y, expected(1), lambda: feed(computed, tensors, grad_y, expected(2)))

        with poisoned_memory() if impl.poisoned else nullcontext():
            stage("build")
            started = time.perf_counter()
            call = impl.build(computed, tensors)
            row["extra"] = {"build_s": time.perf_counter() - started} | figures_of(call)
            stage("check")
            run = step(computed, call, tensors, grad_y)
            outputs = run()
            verdict = compare(reference, outputs)
            if by_chance(reference, verdict):
                other = other_values()
                other.vary(1.0)
                outputs = run()
                verdict = compare(other.reference, outputs)
            if verdict.ok and computed.mode != "backward" and _ignores_its_input(run, outputs, tensors):
                row |= {"max_abs_err": _finite(verdict.max_abs_err), "err_budget": verdict.err_budget}
                return Prepared(row | {"status": "wrong", "reason": REPEATED}, None)
            if verdict.ok and reference.far is not None:
                budget = reference.budgets["y"]
                error, reason = error_far_away(reference.far, reference.expected["y"], budget, run, tensors)
                verdict = Verdict(error, budget, reason) if reason else verdict
    except Exception as error:
        where = impls.registry.line(error, Path(name).resolve()) if name.endswith(".py") else ""
        return Prepared(row | {"status": "error", "reason": first_line(error) + where}, None)
    row |= {"max_abs_err": _finite(verdict.max_abs_err), "err_budget": verdict.err_budget}
    if not verdict.ok:
        return Prepared(row | {"status": "wrong", "reason": verdict.reason}, None)
    return Prepared(row, run, other_values)


def figures_of(call: object) -> dict[str, Any]:
    """The figures that an implementation adds to its rows, `figures` of what it built, as plain values.

    Raises ValueError for a name that a row has already, and for what is no text and no finite number.
    """
    found = {}
    for name, value in dict(getattr(call, "figures", {})).items():
        if not isinstance(name, str) or name in MEASURED:
            raise ValueError(f"figures has {name!r}, which sasa-bench fills itself: choose another name")
        if isinstance(value, numbers.Integral):
            value = int(value)
        elif isinstance(value, numbers.Real):
            value = float(value)
        usable = isinstance(value, str) or (
            abs(value) < MOST if isinstance(value, int) else isinstance(value, float) and math.isfinite(value)
        )
        if not usable:
            raise ValueError(f"figures has {name} = {value!r}: give a finite number or text")
        if why := misfit(name, value):
            raise ValueError(f"figures has {why}")
        found[name] = value
    return found


def _ignores_its_input(run: Callable[[], Any], outputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
    """Whether a call gives the same y again although the images were negated, which is undone exactly afterwards."""
    images = [tensor for name, tensor in tensors.items() if name in IMAGES]
    before = outputs[0].detach().clone()
    with torch.no_grad():
        for image in images:
            image.neg_()
    try:
        again = run()[0]
        return bool(torch.equal(before, again))
    finally:
        with torch.no_grad():
            for image in images:
                image.neg_()


def _unchecked(impl: impls.Impl, case: Case, seed: int, stage: Callable[[str], None]) -> Step:
    tensors = leaves(random_tensors(impl.op, case, seed), case)
    stage("build")
    call = impl.build(case, tensors)
    stage("check")
    grad_y = None if case.mode == "forward" else gradient_of_output(case, call().detach(), seed)
    run = step(case, call, tensors, grad_y)
    run()
    return run


def no_device(case: Case) -> str | None:
    """None, or why torch cannot use the device of a case on this machine and what would help."""
    reason = nvrtc.no_device() if case.device == "cuda" else None
    return f"no CUDA device: {reason}" if reason else None


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
