"""Runs the kernels on the emulator built with sanitizers; test_cuda_mutants.py starts it with them preloaded.

Standard error gets a line before each version of the source, and between them what the sanitizers report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import emulation
import torch
from dense_reference import Problem
from test_cuda_mutants import UNDEFINED
from test_cuda_numerics import run

from sasa_bench.impls.cuda import kernels, launch

PROBLEMS = [
    Problem(height=3, width=5, head_width=15, kernel_size=5),
    Problem(dtype=torch.bfloat16, height=2, width=3, head_width=3, kernel_size=21, zero_border=True),
    Problem(dtype=torch.float16, height=2, width=3, heads=1, head_width=200, kernel_size=3, position=False),
]


def forward(runtime: launch.Runtime, problem: Problem) -> None:
    (q, *rest), _ = problem.inputs()
    emulation.run_forward(runtime, q, *rest, problem.kernel_size, problem.heads, problem.zero_border)


def check(name: str, source: str, passes: Callable[[launch.Runtime, Problem], object], problems: list[Problem]) -> None:
    """Runs some passes of a version of the source on some problems."""
    recorder = emulation.RecordingRuntime()
    for problem in problems:
        passes(recorder, problem)
    library = emulation.build(recorder.expressions, {name: source}, emulation.SANITIZERS)
    print("running", name, file=sys.stderr, flush=True)
    for problem in problems:
        runtime = emulation.EmulatedRuntime(library, name=name)
        passes(runtime, problem)
        assert name != "shipped" or runtime.violations == [], runtime.violations


def main() -> None:
    check("shipped", kernels.source(), run, PROBLEMS)
    check("undefined", UNDEFINED, forward, PROBLEMS[2:])


if __name__ == "__main__":
    main()
