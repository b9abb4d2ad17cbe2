"""Runs the kernels on the emulator built with sanitizers; test_cuda_mutants.py starts it with them preloaded.

Standard error gets a line before each version of the source, and between them what the sanitizers report.
"""

from __future__ import annotations

import sys

import emulation
import torch
from dense_reference import Problem
from test_cuda_mutants import UNDEFINED
from test_cuda_numerics import run

from sasa_bench.impls.cuda import kernels

PROBLEMS = [
    Problem(height=3, width=5, head_width=15, kernel_size=5),
    Problem(dtype=torch.bfloat16, height=2, width=3, head_width=3, kernel_size=21, zero_border=True),
    Problem(dtype=torch.float16, height=2, width=3, heads=1, head_width=200, kernel_size=3, position=False),
]


def main() -> None:
    recorder = emulation.RecordingRuntime()
    for problem in PROBLEMS:
        run(recorder, problem)
    sources = {"shipped": kernels.source(), "undefined": UNDEFINED}
    library = emulation.build(recorder.expressions, sources, emulation.SANITIZERS)
    for name in sources:
        print("running", name, file=sys.stderr, flush=True)
        for problem in PROBLEMS:
            runtime = emulation.EmulatedRuntime(library, name=name)
            run(runtime, problem)
            assert name != "shipped" or runtime.violations == [], runtime.violations


if __name__ == "__main__":
    main()
