"""The same numeric tests on a real GPU. Without one they are skipped."""

from __future__ import annotations

import dense_reference
import pytest
import torch
from dense_reference import Problem
from test_cuda_numerics import DEFAULTS

from sasa_bench.impls import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(cuda.missing()), reason=cuda.missing() or ""),
]


def on_device(problem: Problem) -> list[torch.Tensor]:
    inputs, dy = problem.inputs("cuda")
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    rel = leaves[3:] if problem.position else [None, None]
    y = cuda.local_attention(*leaves[:3], *rel, problem.kernel_size, problem.heads, problem.zero_border)
    wanted = [leaf for leaf in leaves if leaf.numel()]
    gradients = iter(torch.autograd.grad(y, wanted, dy))
    return [y.detach(), *(next(gradients) if leaf.numel() else leaf.detach() for leaf in leaves)]


@pytest.mark.parametrize("problem", DEFAULTS, ids=str)
def test_agrees_with_float64_and_is_deterministic(problem):
    first, second = on_device(problem), on_device(problem)
    assert dense_reference.failures(problem, first) == []
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_on_the_current_stream():
    problem = Problem()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = on_device(problem)
    stream.synchronize()
    assert dense_reference.failures(problem, got) == []


def test_runs_in_a_cuda_graph():
    (q, k, v, rel_row, rel_col), _ = Problem().inputs("cuda")
    expected = cuda.local_attention(q, k, v, rel_row, rel_col, 7, 2, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.local_attention(q, k, v, rel_row, rel_col, 7, 2, False)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
