from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sasa_bench.results.environment import WORKER_ENVIRONMENT
from sasa_bench.timing.memory import kept_bytes, peak_memory


def test_peak_memory_sees_a_temporary_that_is_freed_again() -> None:
    def step() -> float:
        return float(torch.ones(8 << 20).sum())

    step()
    peak, source = peak_memory(step, "cpu")
    assert peak is not None
    assert 30 << 20 < peak < 40 << 20
    assert "high-water" in source


def test_peak_memory_sees_memory_that_the_allocator_had_kept() -> None:
    blocks = [torch.ones(1 << 18) for _ in range(64)]
    del blocks
    peak, _ = peak_memory(lambda: [torch.ones(1 << 18) for _ in range(32)], "cpu")
    assert peak is not None
    assert peak > 30 << 20


def test_an_output_that_is_the_same_memory_in_every_call_counts() -> None:
    y = torch.zeros(1 << 22)
    first, fresh = y.add_(1), y + 1
    assert kept_bytes((first,), (y.add_(1),)) == y.nbytes
    assert kept_bytes((fresh,), (y + 1,)) == 0
    peak, _ = peak_memory(lambda: y.add_(1), "cpu")
    assert peak is not None
    assert y.nbytes <= peak < 1.05 * y.nbytes


def test_what_a_call_raises_is_raised() -> None:
    calls = iter([1, 0])
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / next(calls), "cpu")


def test_peaks_agree_with_arithmetic_and_with_memray() -> None:
    pytest.importorskip("memray", reason="memray is not installed: pip install memray")
    script = Path(__file__).parent / "peak_memory_cases.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=os.environ | WORKER_ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for name, (exact, measured, by_memray) in found.items():
        assert measured == pytest.approx(exact, rel=0.05), name
        assert measured == pytest.approx(by_memray, rel=0.05), name


@pytest.mark.parametrize("error", [AttributeError("no such attribute"), KeyError("k"), OSError("no such file")])
def test_what_a_call_raises_in_the_measuring_thread_is_no_fault_of_the_system(error: Exception) -> None:
    calls = iter([None, error])

    def step() -> torch.Tensor:
        if failed := next(calls):
            raise failed
        return torch.zeros(1)

    with pytest.raises(type(error)):
        peak_memory(step, "cpu")
