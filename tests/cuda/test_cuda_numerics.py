"""The CUDA kernels on the emulator against dense attention in float64: values, gradients, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import dense_reference
import emulation
import pytest
import torch
from dense_reference import Problem

from sasa_bench.impls.cuda import kernels, launch

pytestmark = pytest.mark.timeout(600)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 20

FUNCTIONS = [
    Problem(dtype=dtype, height=6, width=9, position=position, zero_border=zero)
    for dtype, position, zero in product(DTYPES, (True, False), (False, True))
]
SIZES = [
    Problem(height=height, width=width, batch=batch, kernel_size=kernel_size, head_width=4, zero_border=zero)
    for height, width, batch, kernel_size, zero in (
        (1, 1, 1, 3, False),
        (1, 1, 1, 3, True),
        (7, 1, 3, 5, False),
        (1, 7, 1, 5, True),
        (7, 7, 3, 7, False),
        (5, 33, 1, 3, False),
        (3, 63, 1, 7, False),
        (4, 3, 1, 19, False),
        (4, 3, 1, 19, True),
        (3, 5, 1, 33, False),
        (3, 5, 1, 33, True),
    )
]
WINDOWS = [Problem(height=8, width=6, heads=1, head_width=6, kernel_size=size) for size in (1, 3, 7, 9, 11, 17, 23)]
HEAD_WIDTHS = [
    Problem(height=5, width=6, heads=2, head_width=head_width, kernel_size=3)
    for head_width in (1, 2, 5, 8, 12, 16, 33, 64, 128, 200)
]
WIDE_16_BIT = [
    Problem(
        dtype=dtype,
        height=5,
        width=7,
        heads=1,
        head_width=head_width,
        kernel_size=kernel_size,
        zero_border=zero,
    )
    for dtype, head_width, kernel_size, zero in (
        (torch.float16, 64, 7, False),
        (torch.bfloat16, 32, 11, True),
        (torch.float16, 1, 5, False),
        (torch.bfloat16, 128, 19, False),
    )
]
GROUPS = {
    "functions": FUNCTIONS,
    "sizes": SIZES,
    "windows": WINDOWS,
    "head widths": HEAD_WIDTHS,
    "16 bits": WIDE_16_BIT,
}
DEFAULTS = [problem for group in GROUPS.values() for problem in group]
# Every candidate that the search on a device would measure.
SEARCHED = [
    (Problem(height=height, width=width, heads=3, head_width=head_width, kernel_size=kernel_size), index)
    for height, width, head_width, kernel_size in (
        (9, 14, 32, 5),
        (5, 7, 16, 19),
        (6, 35, 4, 3),
    )
    for index in range(kernels.MOST_CANDIDATES)
]


class Pick:
    """Takes the candidate with a fixed number, of as many as there are."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, key: str, candidates: list[kernels.Tunables]) -> kernels.Tunables:
        return candidates[self.index % len(candidates)]


def run(runtime: launch.Runtime, problem: Problem) -> list[torch.Tensor]:
    """y and all gradients, outputs poisoned with NaN first."""
    (q, k, v, rel_row, rel_col), dy = problem.inputs()
    axes = (problem.kernel_size, problem.heads, problem.zero_border)
    y, log2_sum = emulation.run_forward(runtime, q, k, v, rel_row, rel_col, *axes)
    gradients = emulation.run_backward(runtime, dy, q, k, v, rel_row, rel_col, y, log2_sum, *axes)
    return [y, *gradients]


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@cache
def library(group: str) -> Path:
    """Every kernel that the problems of a group launch; a library each, so that test processes compile side by side."""
    recorder = emulation.RecordingRuntime()
    if group == "searched":
        for problem, index in SEARCHED:
            recorder.pick = Pick(index)
            run(recorder, problem)
    else:
        for problem in GROUPS[group]:
            run(recorder, problem)
    return emulation.build(recorder.expressions)


@pytest.mark.parametrize(
    ("group", "problem"), [(group, problem) for group, found in GROUPS.items() for problem in found], ids=str
)
def test_agrees_with_float64_in_any_thread_order(group, problem):
    first = None
    for order in (ASCENDING, DESCENDING, SHUFFLED):
        runtime = emulation.EmulatedRuntime(library(group), order)
        got = run(runtime, problem)
        assert runtime.violations == []
        assert dense_reference.failures(problem, got) == []
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True)), "not deterministic"


@pytest.mark.parametrize(("problem", "index"), SEARCHED, ids=str)
def test_every_candidate_of_the_search_agrees(problem, index):
    runtime = emulation.EmulatedRuntime(library("searched"), SHUFFLED, Pick(index))
    got = run(runtime, problem)
    assert runtime.violations == []
    assert dense_reference.failures(problem, got) == []


def test_thirds_of_a_projection_are_read_and_written_where_they_lie():
    problem = Problem(height=8, width=6, heads=1, batch=2, head_width=6, kernel_size=7)
    (q, k, v, rel_row, rel_col), dy = problem.inputs()
    runtime = Launches(library("windows"), SHUFFLED)
    axes = (problem.kernel_size, problem.heads, problem.zero_border)
    thirds = torch.cat([q, k, v], 1).chunk(3, 1)
    dqkv = torch.full((2, 18, 8, 6), float("nan")).chunk(3, 1)
    y, log2_sum = torch.empty_like(q), torch.empty(2, 1, 8, 6)
    drel = [torch.empty_like(rel_row), torch.empty_like(rel_col)]
    launch.run_forward(runtime, *thirds, rel_row, rel_col, y, log2_sum, *axes)
    launch.run_backward(runtime, dy, *thirds, rel_row, rel_col, y, log2_sum, *dqkv, *drel, *axes)
    assert runtime.violations == []
    assert dense_reference.failures(problem, [y, *dqkv, *drel]) == []
    assert {t.data_ptr() for t in (*thirds, *dqkv)} <= runtime.addresses


class Launches(emulation.EmulatedRuntime):
    """Also remembers where the tensors of its launches begin."""

    addresses: set[int]

    def launch(self, source, expression, grid, block, arguments):
        known = self.__dict__.setdefault("addresses", set())
        known.update(t.data_ptr() for t in arguments if isinstance(t, torch.Tensor))
        super().launch(source, expression, grid, block, arguments)


def test_large_logits_do_not_overflow():
    problem = Problem(height=6, width=9)
    (q, k, v, rel_row, rel_col), _ = problem.inputs()
    runtime = emulation.EmulatedRuntime(library("functions"))
    y, _ = emulation.run_forward(runtime, 1e4 * q, k, v, rel_row, rel_col, 7, 2, False)
    truth = dense_reference.attention(*(t.double() for t in (1e4 * q, k, v, rel_row, rel_col)), 7, 2, False)
    assert (y - truth).abs().max() < 1e-2  # the logits are near 1e5, where float32 resolves 1e-2


def test_no_tensor_grows_with_the_square_of_the_window(monkeypatch):
    largest = []
    for kernel_size in (7, 19):
        sizes = []
        launch = emulation.RecordingRuntime.launch

        def record(self, source, expression, grid, block, arguments, sizes=sizes, launch=launch):
            sizes.extend(t.numel() for t in arguments if isinstance(t, torch.Tensor))
            launch(self, source, expression, grid, block, arguments)

        monkeypatch.setattr(emulation.RecordingRuntime, "launch", record)
        run(emulation.RecordingRuntime(), Problem(height=28, width=28, kernel_size=kernel_size))
        largest.append(max(sizes))
        monkeypatch.undo()
    assert largest[1] <= 19 / 7 * largest[0] + 1
