"""How a submitter, its folder and Slurm bear many tasks: the rows are made up, so that nothing but the rest is timed.

`python tests/slurm/many_tasks.py 1000` starts a cluster of this machine, runs that many tasks, and prints figures.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster

from sasa_bench.case import Case
from sasa_bench.results.file import Writer
from sasa_bench.results.merge import write
from sasa_bench.results.record import ImplInfo, Record
from sasa_bench.suite import Suite
from sasa_bench.sweep.cluster import Options, Progress, drive, locked, queue, submitted
from sasa_bench.sweep.slurm import load, open_sweep
from sasa_bench.timing.probe import detect

CPUS = 8
"""Tasks at once. The node pretends to have as many, so that a task's waiting overlaps with the work of others."""


@dataclass(frozen=True)
class Pretend:
    """The work of a task without the measuring."""

    folder: Path

    def __call__(self, index: int) -> None:
        sweep = load(self.folder)
        with locked(sweep.file(index)), Writer(sweep.file(index), locked=True) as writer:
            machine = detect()
            writer.machine(machine)
            writer.impls([ImplInfo("made_up", "none", "takes no time", 0)])
            for suite in sweep.shards[index]:
                writer.rows(
                    Record(
                        suite=suite.name,
                        impl="made_up",
                        op="none",
                        case=case,
                        status="skipped",
                        reason="made up: nothing was measured",
                        machine=machine.id,
                    )
                    for case in suite.cases
                )


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(seconds, answer) of a call."""
    start = time.perf_counter()
    answer = call(*arguments)
    return time.perf_counter() - start, answer


def main(count: int) -> None:
    """Run `count` tasks of five rows each and print what each part took."""
    cases = tuple(
        Case(channels=8 * c, resolution=r, batch=b) for c in range(1, count + 1) for r in (7, 14) for b in (1, 2)
    )
    cases += tuple(Case(channels=8 * c, resolution=28, batch=1) for c in range(1, count + 1))
    suite = Suite("many", "How do many tasks behave?", ("made_up",), cases, ("channels", "resolution", "batch"))
    infos = {"made_up": ImplInfo("made_up", "none", "takes no time", 0)}
    options = Options({"cpus-per-task": "1"}, tasks=count, at_once=CPUS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(folder / "cluster", cpus=CPUS)
        cluster.start()
        os.environ |= cluster.environment
        try:
            out = folder / "many.jsonl"
            cutting, sweep = timed(open_sweep, out, False, [suite], (), infos, options, 0.6, 120.0)
            print(f"{len(cases)} rows cut into {len(sweep.shards)} tasks: {cutting:.2f} s")
            worst = {"a look at all files": 0.0, "a question to squeue": 0.0}

            def missing() -> dict[int, int]:
                seconds, left = timed(sweep.missing)
                worst["a look at all files"] = max(worst["a look at all files"], seconds)
                return left

            def report(now: Progress) -> None:
                seconds, _ = timed(queue, sweep.name)
                worst["a question to squeue"] = max(worst["a question to squeue"], seconds)

            total, lost = timed(drive, sweep.folder, sweep.name, Pretend(sweep.folder), missing, options, report)
            merging, merged = timed(sweep.merged)
            writing, _ = timed(write, merged.results, out)
            logs = list((sweep.folder / "logs").iterdir())
            print(f"from the first submission to the last row: {total:.0f} s, {count / total:.2f} tasks a second")
            print(f"submissions {len(submitted(sweep.folder))}, given up {len(lost)}, rows {len(merged.results.rows)}")
            for what, seconds in worst.items():
                print(f"{what}, at worst: {seconds:.2f} s")
            print(f"merging: {merging:.2f} s; writing: {writing:.2f} s")
            size = sum(path.stat().st_size for path in [*logs, *sweep.folder.glob("*.json*")])
            print(
                f"files: {len(logs)} of submitit, {len(sweep.shards) + 2} of ours, {size / count / 1e3:.1f} kB a task"
            )
        finally:
            cluster.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]))
