"""What every test of an implementation asks: does it agree with its op's reference?"""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.ops.tensors import arranged, leaves, step
from sasa_bench.timing.check import compare, compute_reference, poisoned_memory


def agree(name: str, case: Case) -> None:
    """Assert that an implementation is within its error budget on fresh random input, or says why it cannot."""
    impl = impls.get(name)
    if impl.missing() or impl.supports(case):
        pytest.skip(impl.missing() or impl.supports(case) or "")
    computed = impl.computes(case)
    reference = compute_reference(impl.op, computed, random.randrange(1 << 31))
    tensors = leaves(reference.tensors, computed)
    grad_y = None if reference.grad_y is None else arranged(reference.grad_y, computed).to(getattr(torch, case.dtype))
    with poisoned_memory() if impl.poisoned else nullcontext():
        outputs = step(computed, impl.build(computed, tensors), tensors, grad_y)()
    verdict = compare(reference, outputs)
    assert verdict.ok, f"{name} at {case.describe()}: {verdict.reason}"
