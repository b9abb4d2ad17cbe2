"""What every test of an implementation asks: does it agree with its op's reference?"""

from __future__ import annotations

import random
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import arranged, leaves, step
from sasa_bench.timing.check import Reference, by_chance, compare, compute_reference, poisoned_memory


@cache
def drawn(op: Op, case: Case) -> Reference:
    """Random input and what is expected of it: one draw for all implementations of a case, another in each process."""
    return compute_reference(op, case, random.randrange(1 << 31))


def reason_not_to_run(name: str, case: Case) -> str | None:
    """None, or why an implementation cannot run a case here."""
    impl = impls.get(name)
    return impl.missing() or impl.supports(case)


def agree(name: str, case: Case) -> None:
    """Assert that an implementation is within its error budget on random input, or skip with why it cannot run."""
    if reason := reason_not_to_run(name, case):
        pytest.skip(reason)
    assert_right(name, case)


def assert_right(name: str, case: Case) -> None:
    """Assert that an implementation is within its error budget on random input."""
    impl = impls.get(name)
    computed = impl.computes(case)
    for _ in range(3):
        reference = drawn(impl.op, computed)
        tensors = leaves(reference.tensors, computed)
        grad_y = reference.grad_y
        if grad_y is not None:
            grad_y = arranged(grad_y, computed).to(getattr(torch, case.dtype))
        with poisoned_memory() if impl.poisoned else nullcontext():
            outputs = step(computed, impl.build(computed, tensors), tensors, grad_y)()
        verdict = compare(reference, outputs)
        if not by_chance(reference, verdict):
            break
        drawn.cache_clear()
    assert verdict.ok, f"{name} at {case.describe()}: {verdict.reason}"
