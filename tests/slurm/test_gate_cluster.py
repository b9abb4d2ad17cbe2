"""A gate over a real Slurm cluster: identical code passes; a head that sleeps does not, though a task is killed."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, wait_for

import sasa_bench
from sasa_bench.case import Case
from sasa_bench.gate import cluster as gate_slurm
from sasa_bench.gate import outputs as gate_report
from sasa_bench.gate.arms import set_up
from sasa_bench.gate.decision import Result
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.verdicts import Rules
from sasa_bench.sweep.cluster import parse_options, submitted

pytestmark = pytest.mark.timeout(900)

POINTS = [
    Point(impl, Case(channels=32, resolution=14, kernel_size=5, batch=1, threads=1)) for impl in ("unfold", "conv3x3")
]
"""One thread: two that wait for each other beside a busy process take longer than the sleep that is to be found."""
RULES = Rules(screen_pairs=1, confirm_pairs=4, suspect=3.0, margin=1.0, tolerance=99.0, alpha=0.1)
"""Four pairs are enough to convict a suspect at 10 %. What is not four times as slow counts as noise: what the machine
does beside the test decides nothing."""
SLEEP = "import time; time.sleep(0.05); "


def checkout(folder: Path, sleep: str = "") -> str:
    shutil.copytree(
        Path(sasa_bench.__file__).parent, folder / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__")
    )
    kernel = folder / "sasa_bench" / "impls" / "unfold.py"
    text = kernel.read_text()
    assert text.count("keys = windows(k)") == 1
    kernel.write_text(text.replace("keys = windows(k)", f"{sleep}keys = windows(k)") + f"# {folder.name}\n")
    return str(folder)


def gated(folder: Path, points: Sequence[Point], sleep: str = "") -> Result:
    arms = set_up(checkout(folder / "b"), checkout(folder / "h", sleep), folder)
    options = parse_options([f"array={len(points)}", "time=30", "exclusive=no", "cpus-per-task=1"])
    plan = gate_slurm.prepare(folder, arms, points, RULES, options, 300.0, 60.0)
    return gate_slurm.run(plan, options, lambda now: None)


def test_a_gate_over_a_cluster_tells_a_slow_head_from_an_identical_one(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    tasks = tmp_path / "slow" / "tasks"

    def at_work() -> list[str]:
        owners = submitted(tasks) if (tasks / "jobs.jsonl").exists() else {}
        return [job for job in cluster.running() if job in owners and (tasks / f"{owners[job]:04}.lock").exists()]

    with ThreadPoolExecutor(2) as pool:
        slow_gate = pool.submit(gated, tmp_path / "slow", POINTS, SLEEP)
        same_gate = pool.submit(gated, tmp_path / "same", POINTS[:1])
        wait_for(lambda: bool(at_work()), 60, "a task is at work")
        cluster.run("scancel", "--full", "--signal=KILL", at_work()[0])
        same, slow = same_gate.result(), slow_gate.result()
    assert (same.verdict, same.exit_status) == ("PASS", 0), gate_report.text(same)
    assert (slow.verdict, slow.exit_status) == ("REGRESSION", 2), gate_report.text(slow)
    assert {case.key for case in slow.cases if case.verdict == "REGRESSION"} == {POINTS[0].key}
    assert [len(share.keys) for share in slow.shares] == [1, 1]
    assert set(slow.nodes.values()) == {socket.gethostname()}
    assert sorted(submitted(tasks).values()) in ([0, 0, 1], [0, 1, 1])
    wait_for(lambda: not cluster.run("squeue", "--noheader"), 60, "the queue is empty")
