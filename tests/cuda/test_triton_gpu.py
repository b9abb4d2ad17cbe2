"""The Triton kernels on a real GPU. Without one these tests are skipped."""

from __future__ import annotations

from itertools import product

import dense_reference
import pytest
import torch
from dense_reference import Problem

from sasa_bench.impls import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(triton.missing()), reason=triton.missing() or ""),
]

F16, BF16 = torch.float16, torch.bfloat16
PROBLEMS = [
    *(Problem(dtype=dtype, batch=2, head_width=16, height=9, width=13, position=position, zero_border=zero)
      for dtype, position, zero in product((F16, BF16), (True, False), (False, True))),
    *(Problem(dtype=F16, head_width=width, height=5, width=9, kernel_size=window)
      for width, window in ((5, 3), (8, 7), (32, 5), (64, 7), (128, 3), (16, 19), (16, 33))),
]  # fmt: skip


def of_float32(tf32: bool) -> Problem:
    """tf32 has as many bits as float16, so it may err as much; without tf32, as little as float32."""
    return Problem(dtype=F16 if tf32 else torch.float32, batch=2, head_width=16, height=9, width=13)


def attended(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """y of the problem's inputs in `dtype`."""
    inputs = [None if t is None else t.to(dtype) for t in problem.inputs("cuda")[0]]
    return triton.OPERATORS.attend(*inputs, problem.kernel_size, problem.heads, problem.zero_border)


def on_device(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """y and all gradients of the problem's inputs in `dtype`."""
    inputs, dy = problem.inputs("cuda")
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
    y = triton.OPERATORS.attend(*leaves, problem.kernel_size, problem.heads, problem.zero_border)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_agrees_with_float64_and_is_deterministic(problem):
    first, second = (on_device(problem, problem.dtype) for _ in range(2))
    assert dense_reference.failures(problem, first, dense_reference.TENSOR_CORE_FACTOR) == []
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_agrees_with_float64_as_far_as_tf32_reaches(allowed):
    problem = of_float32(allowed)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        found = on_device(problem, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert dense_reference.failures(problem, found, dense_reference.TENSOR_CORE_FACTOR) == []
