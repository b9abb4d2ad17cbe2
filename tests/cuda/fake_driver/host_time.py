"""Host time of a call of the CUDA kernels, through the FAKE driver, whose launches do nothing.

python tests/cuda/fake_driver/host_time.py    prints microseconds, median and 10th percentile of single calls
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]
CALLS, WARM = 3000, 200


def microseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Median and 10th percentile of the time of one call."""
    times = []
    for number in range(WARM + CALLS):
        began = time.perf_counter_ns()
        call()
        if number >= WARM:
            times.append((time.perf_counter_ns() - began) / 1e3)
    times.sort()
    return times[CALLS // 2], times[CALLS // 10]


def main() -> None:
    import torch
    from dense_reference import Problem

    from sasa_bench.impls import _nvrtc as nvrtc
    from sasa_bench.impls.cuda import launch, operator

    made = nvrtc.Runtime(0, stream=lambda: 0x5A5A)
    nvrtc.runtime = lambda device: made
    problem = Problem(height=28, width=28, batch=2, heads=8, head_width=16)
    (q, k, v, rel_row, rel_col), _ = problem.inputs()
    qkv = torch.cat([q, k, v], 1)
    axes = (problem.kernel_size, problem.heads, problem.zero_border)
    y, log2_sum = torch.empty_like(q), torch.empty(2, 8, 28, 28)
    with_gradients = qkv.clone().requires_grad_()
    calls = {
        "launch of a planned forward": lambda: launch.run_forward(
            made, *qkv.chunk(3, 1), rel_row, rel_col, y, log2_sum, *axes
        ),
        "operator on q, k, v": lambda: operator.forward(q, k, v, rel_row, rel_col, *axes),
        "operator on qkv": lambda: operator.forward_qkv(qkv, rel_row, rel_col, *axes),
        "differentiable operator on qkv": lambda: operator.OPERATORS.attend_qkv(qkv, rel_row, rel_col, *axes),
        "the same for a backward pass": lambda: operator.OPERATORS.attend_qkv(with_gradients, rel_row, rel_col, *axes),
    }
    for name, call in calls.items():
        median, low = microseconds(call)
        print(f"{name}: {median:.1f} us, 10th percentile {low:.1f} us")


if __name__ == "__main__":
    if "FAKE_DRIVER_IDLE" in os.environ:
        main()
    else:
        import emulation

        with tempfile.TemporaryDirectory() as folder:
            environment = emulation.fake_driver(Path(folder)) | {"FAKE_DRIVER_IDLE": "1", "SASA_BENCH_TUNE": "0"}
            subprocess.run([sys.executable, __file__], env=environment, check=True)
