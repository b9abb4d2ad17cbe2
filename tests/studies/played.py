"""A package that measures nothing: the worker, the machine, Slurm's commands and the arms of the gate are played."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sasa_bench.case import Case
from sasa_bench.cli import gating
from sasa_bench.gate import cluster as gate_cluster
from sasa_bench.gate import run as gate_run
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.pairs import Pair, Point
from sasa_bench.results.record import ImplInfo
from sasa_bench.sweep import cluster, run, workers
from sasa_bench.timing import probe
from sasa_bench.timing.process import Request

ROW_S = 0.0004
"""Seconds that the played worker takes for a row."""
MACHINE = probe.detect()


class PlayedWorker:
    """A worker that gives made-up rows, the same for the same case."""

    def __init__(self, timeout_s: float, environment: object = None) -> None:
        self.spent_s: dict[str, float] = {}

    def ask(self, do: str, **values: Any) -> Any:
        if do == "roof":
            return [1e11, 1e10]
        ops = {"conv3x3": "convolution"}
        return [asdict(ImplInfo(n, ops.get(n, "local_attention"), "played", i)) for i, n in enumerate(values["impls"])]

    def measure(self, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
        for impl in request.impls:
            time.sleep(ROW_S)
            samples = [1e-3 * (request.case.batch + i / 100) for i in range(20)]
            yield impl, {"status": "ok", "reason": "", "samples_s": samples, "inner_count": 1, "flops": 1000}

    def close(self) -> None:
        pass


def play(put: Callable[[object, str, object], None] = setattr) -> None:
    """Replace, in this process, the worker, the look at the machine, Slurm's commands and the arms of the gate.

    `put` sets an attribute of a module; that of pytest's monkeypatch takes it back.
    """
    put(workers, "Worker", PlayedWorker)
    for module in (run.probe, probe):
        put(module, "detect", lambda: MACHINE)
    put(cluster, "require_slurm", lambda: None)
    put(cluster, "queue", lambda name: {})
    put(cluster, "submit", _submit)
    for pause in ("LOOK_S", "ASK_S"):
        put(cluster, pause, 0.0)
    arms = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]
    points = [Point("unfold", Case(batch=batch, threads=1)) for batch in range(1, 7)]
    put(gating, "_prepared", lambda asked, folder: (arms, points))
    loaded = {"torch": "2", "libraries": {}, "python": "p"}
    put(gate_run, "survey", lambda arm, impls, timeout_s: (loaded | {"digest": arm.name}, {}))
    row = {"status": "ok", "reason": "", "flops": 1, "params": 1, "operator_count": 1, "allocated_bytes": 1}
    put(
        gate_run,
        "exact_rows",
        lambda arms, points, *more: {arm.name: {p.key: dict(row) for p in points} for arm in arms},
    )
    put(gate_run, "measure_pair", _pair)
    put(gate_cluster, "_ops", lambda arms, impls, timeout_s: dict.fromkeys(impls, "local_attention"))


def _submit(folder: Path, name: str, work: Any, indexes: Sequence[int], options: object) -> dict[str, int]:
    # Tasks run one after another in the submitter, so that whatever ends it ends a task too.
    for index in indexes:
        work(index)
    return {f"1_{index}": index for index in indexes}


def _pair(arms: object, points: Sequence[Point], *arguments: Any, **more: Any) -> Pair:
    time.sleep(0.002)
    figures = {point.key: 0.001 * random.Random(point.key).random() for point in points}
    return Pair(figures, figures, dict.fromkeys(figures, 0.002), {key: [value] for key, value in figures.items()}, 0.0)
