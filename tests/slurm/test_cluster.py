"""A sweep over a real Slurm cluster on which everything fails once equals the sweep of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from cluster import Cluster, wait_for

from sasa_bench.case import AXES
from sasa_bench.report.table import frame
from sasa_bench.results.file import read
from sasa_bench.sweep.cluster import submitted
from sasa_bench.sweep.slurm import count_rows, load

pytestmark = pytest.mark.timeout(600)
SUITE = Path(__file__).parent / "sweep.toml"
ROWS, TASKS = 200, 7
SAME = [
    "suite",
    "impl",
    "op",
    "status",
    "reason",
    *AXES,
    "flops",
    "params",
    "min_bytes",
    "memory_source",
    "machine",
    "commit",
]
"""Columns that no run changes: what was asked for, what it costs, and the machine."""


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sasa_bench", "run", str(SUITE), "--budget", "0.02", "--out", str(out), *more]


def table_of(path: Path) -> pd.DataFrame:
    return frame(read([path]))[SAME].sort_values(SAME).reset_index(drop=True)


class Submitter:
    """`run --slurm` in a process of its own."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        self.cluster, self.out = cluster, out
        self.log = out.with_suffix(".log").open("ab")
        self.process: subprocess.Popen[bytes]

    def start(self, *more: str) -> None:
        words = command(self.out, "--slurm", "time=30", "--slurm", f"array={TASKS}", *more)
        self.process = subprocess.Popen(
            words, env=self.cluster.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the submitter still waits after {seconds:g} s:\n{self.said()}\n{self.cluster.state()}")

    def said(self) -> str:
        return Path(self.log.name).read_text()

    def under_way(self, besides: set[int]) -> tuple[str, int]:
        """(job, task) of one that runs, has measured something but not all, and is none of `besides`."""
        found: list[tuple[str, int]] = []

        def look() -> bool:
            assert self.process.poll() in (None, -signal.SIGKILL), self.said()
            folder = self.out.with_suffix(".tasks")
            if not (folder / "plan.json").exists():
                return False
            sweep, owners = load(folder), submitted(folder)
            for index in (owners[job] for job in self.cluster.running() if job in owners):
                if index not in besides and 0 < count_rows(sweep.file(index)) < sweep.size(index):
                    found.append((next(job for job in self.cluster.running() if owners[job] == index), index))
            return bool(found)

        wait_for(look, 120, "a task that has measured something")
        return found[0]


@pytest.fixture
def submitter(cluster: Cluster, tmp_path: Path) -> Iterator[Submitter]:
    found = Submitter(cluster, tmp_path / "cluster.jsonl")
    found.start()
    yield found
    found.kill()


def test_a_sweep_loses_nothing_when_tasks_nodes_daemons_and_the_submitter_die(
    cluster: Cluster, submitter: Submitter, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.jsonl"
    one_process = subprocess.Popen(command(alone))
    hurt: set[int] = set()

    def next_task() -> str:
        job, index = submitter.under_way(hurt)
        hurt.add(index)
        return job

    # a task is killed: the submitter starts it again
    cluster.run("scancel", "--full", "--signal=KILL", next_task())

    # a task is pre-empted: Slurm starts it again
    preempted = next_task()
    cluster.run("scontrol", "requeue", preempted)
    cluster.start_at_once(preempted)

    # the submitter dies: its tasks go on without it
    next_task()
    submitter.kill()

    # the node daemon dies alone, and the node is given up while its task lives on
    survivor = next_task()
    cluster.kill("slurmd")
    cluster.give_up_node()
    cluster.start_node()
    cluster.start_at_once(survivor)

    submitter.start("--resume")

    # the node loses power
    lost = next_task()
    cluster.kill_node()
    cluster.give_up_node()
    cluster.start_node()
    cluster.start_at_once(lost)

    # the controller dies and comes back
    next_task()
    cluster.kill_controller()
    cluster.start_controller()

    assert submitter.wait(240) == 0, submitter.said()
    assert len(hurt) == 6
    sweep = load(submitter.out.with_suffix(".tasks"))
    measured = Counter(row.key for index in range(len(sweep.shards)) for row in read([sweep.file(index)]).rows)
    assert len(measured) == ROWS
    assert set(measured.values()) == {1}
    assert one_process.wait(timeout=240) == 0
    assert "revisions of sasa-bench" not in submitter.said(), "the working tree changed during the test: run it again"
    pd.testing.assert_frame_equal(table_of(submitter.out), table_of(alone))
    wait_for(lambda: not cluster.run("squeue", "--noheader"), 60, "the queue is empty")
