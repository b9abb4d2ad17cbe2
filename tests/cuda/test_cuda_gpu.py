"""The same numeric tests on a real GPU, and timings, which go to a file. Without a GPU they are skipped."""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path

import dense_reference
import pytest
import torch
from dense_reference import Problem
from test_cuda_numerics import DEFAULTS, DTYPES

from sasa_bench.impls import cuda

RESULTS = Path(__file__).parents[2] / "reports" / "cuda-gpu-tests.json"
SAMPLES = 20
# (channels, image side) of the stages of a ResNet; 8 heads, window 7, batch 32.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))

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


def seconds(call) -> float:
    """Median device time of a call, caches warm."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(samples)


def times(channels: int, side: int, dtype: torch.dtype) -> dict[str, str | float]:
    """Device times of one stage in seconds, next to a 3x3 convolution of as many channels."""
    problem = Problem(dtype=dtype, batch=32, heads=8, head_width=channels // 8, height=side, width=side)
    inputs, dy = problem.inputs("cuda")
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    y = cuda.local_attention(*leaves, 7, 8, False)
    weight = torch.randn(channels, channels, 3, 3, device="cuda", dtype=dtype)
    return {
        "problem": str(problem),
        "forward_hot_s": seconds(lambda: cuda.local_attention(*leaves, 7, 8, False)),
        "backward_hot_s": seconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)),
        "conv3x3_forward_hot_s": seconds(lambda: torch.nn.functional.conv2d(leaves[0], weight, padding=1)),
    }


def test_timings_are_written():
    rows = [times(channels, side, dtype) for (channels, side), dtype in product(STAGES, DTYPES)]
    device = torch.cuda.get_device_properties(0).name
    result = {"device": device, "torch": torch.__version__, "samples": SAMPLES, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result | {"doctor": cuda.describe()}, indent=1))
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))
