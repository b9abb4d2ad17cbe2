"""A made-up sweep in tasks, and what its tasks would write."""

from __future__ import annotations

from pathlib import Path

from factory import machine, record

from sasa_bench.case import Case
from sasa_bench.results.file import Writer
from sasa_bench.results.record import ImplInfo
from sasa_bench.suite import Suite
from sasa_bench.sweep.cluster import Options
from sasa_bench.sweep.slurm import Sweep, open_sweep

INFOS = {"unfold": ImplInfo("unfold", "local_attention", "", 0), "conv3x3": ImplInfo("conv3x3", "convolution", "", 1)}
CASES = tuple(Case(batch=b, threads=2) for b in range(1, 6))
SUITE = Suite("five", "A question?", tuple(INFOS), CASES, ("batch",))


def opened(
    out: Path, resume: bool = False, suite: Suite = SUITE, tasks: int | None = 2, budget_s: float = 0.6
) -> Sweep:
    return open_sweep(out, resume, [suite], (), INFOS, Options(tasks=tasks), budget_s, 120.0)


def fill(sweep: Sweep, index: int, most: int | None = None) -> None:
    """Write what a task would, or the first `most` rows of it."""
    (suite,) = sweep.shards[index]
    rows = [record(impl, suite=suite.name, case=case) for case in suite.cases for impl in suite.impls]
    with Writer(sweep.file(index)) as writer:
        writer.machine(machine())
        writer.rows(rows[:most])
