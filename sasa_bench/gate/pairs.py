"""Pairs: live processes of all arms are interleaved block by block, so that what disturbs one disturbs all."""

from __future__ import annotations

import inspect
import math
import os
import random
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sasa_bench.case import Case
from sasa_bench.gate import clock
from sasa_bench.gate.arms import Arm, verify
from sasa_bench.gate.layout import Layout
from sasa_bench.gate.sources import ArmError
from sasa_bench.gate.verdicts import LATE
from sasa_bench.results.environment import EXPORTS, WORKER_ENVIRONMENT
from sasa_bench.timing import host
from sasa_bench.timing.process import Worker, WorkerDied, WorkerRefused

ENVIRONMENT = WORKER_ENVIRONMENT | {"GOMP_SPINCOUNT": "5000"}
"""The arms of a pair are alive together: threads of the one that waits must sleep soon, or they take the other's cores.
Some 50 us of spinning outlast the gaps between parallel regions, so that calls are as fast as with threads that never
sleep, and are nothing next to a block."""

SEED = 20190605
BLOCK_S = 0.005
BLOCKS, MOST_BLOCKS = 15, 61
PAIR_S = 6.0
"""Few cases get more blocks, until a pair is measured for about as long as its processes take to start."""


@dataclass(frozen=True)
class Point:
    """A case and the implementation that runs it."""

    impl: str
    case: Case

    @property
    def key(self) -> str:
        """A name for people and files, unique in a suite."""
        return f"{self.impl} {self.case.describe({'threads': self.case.threads})}"

    def request(self, arm: Arm) -> list[Any]:
        """What a worker of `arm` prepares: the implementation by its name there, and the fields of the case.

        Fields that have their default are left out: their default means what code did before there was such a field,
        so an older revision need not know it.
        """
        plain = {f.name: f.default for f in fields(Case)}
        named = {name: value for name, value in self.case.to_dict().items() if value != plain[name]}
        return [arm.impl(self.impl), named]


@dataclass
class Counts:
    """key -> calls that fill a block, and seconds per call; found once, on the base arm, and used in every arm."""

    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def take(self, found: Mapping[str, Sequence[float]]) -> None:
        """Add what a calibration found of the cases that are not known yet."""
        for key, (calls, seconds) in found.items():
            if key not in self.calls:
                self.calls[key], self.seconds[key] = int(calls), float(seconds)


Spin = Callable[[Counts], Mapping[str, float]]
"""Seconds to add to each call of head, by key, from the calibrated times: a slow-down made on purpose."""


def no_slow_down(counts: Counts) -> Mapping[str, float]:
    """The Spin that adds no time."""
    return {}


@dataclass(frozen=True)
class Pair:
    """One pair of fresh processes, and the copy of base beside them.

    head, floor: key -> median over blocks of log(head / base) and log(copy / base).
    seconds: key -> median seconds per call of base.
    blocks: key -> log(head / base) of each block.
    disturbed: share of the processors that others had while the blocks were timed, see timing.host.
    at_s: seconds from the start of the run to that of the pair.
    """

    head: dict[str, float]
    floor: dict[str, float]
    seconds: dict[str, float]
    blocks: dict[str, list[float]]
    disturbed: float = 0.0
    at_s: float = 0.0


def exact_rows(
    arms: Sequence[Arm],
    points: Sequence[Point],
    timeout_s: float,
    layout: Layout | None = None,
    until: float = math.inf,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> key -> fields of a Record, with `operator_count` and `allocated_bytes`, checked against the reference.

    No case starts after `until`, by the monotonic clock: its status is LATE in every arm.

    Runs in a fresh process of each arm at once, which also compiles what needs compiling. A case that kills one, or
    that an arm does not know, gets an error row there. One that failed in an arm and not in another is tried again
    there, in a process of its own: two arms at once may need more memory than there is.
    """
    rows = _exact_rows(arms, points, timeout_s, layout, until)
    for arm in arms if time.monotonic() <= until else ():
        failed = [point for point in points if rows[arm.name][point.key]["status"] in ("error", "timeout")]
        others = [rows[other.name] for other in arms if other is not arm]
        if again := [p for p in failed if not others or any(of[p.key]["status"] == "ok" for of in others)]:
            found = _exact_rows([arm], again, timeout_s, layout, until)[arm.name]
            rows[arm.name] |= {key: row for key, row in found.items() if row["status"] != LATE}
    return rows


def _exact_rows(
    arms: Sequence[Arm], points: Sequence[Point], timeout_s: float, layout: Layout | None, until: float
) -> dict[str, dict[str, dict[str, Any]]]:
    rows: dict[str, dict[str, dict[str, Any]]] = {arm.name: {} for arm in arms}
    workers: dict[str, Worker] = {}
    try:
        for point in points:
            if time.monotonic() > until:
                late = {"status": LATE, "reason": "the time budget ended before it was built; --budget allows more"}
                for arm in arms:
                    rows[arm.name][point.key] = late
                continue
            fresh = [arm for arm in arms if arm.name not in workers]
            for arm in fresh:
                workers[arm.name] = start(arm, timeout_s, layout)
            for arm in fresh:
                verify(arm, workers[arm.name].ask("loaded"))
            answers = {
                arm.name: workers[arm.name].send(
                    "prepare_cases", cases={point.key: point.request(arm)}, seed=SEED, exact=True
                )
                for arm in arms
            }
            for name, answer in answers.items():
                try:
                    rows[name] |= answer()
                except WorkerRefused as refused:
                    rows[name][point.key] = {"status": "error", "reason": str(refused)}
                except WorkerDied as death:
                    rows[name][point.key] = {"status": death.status, "reason": str(death)}
                    workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def measure_pair(
    arms: Sequence[Arm],
    points: Sequence[Point],
    counts: Counts,
    timeout_s: float,
    blocks: int | None = None,
    spin: Spin = no_slow_down,
    layout: Layout | None = None,
) -> Pair:
    """Start a fresh process for each arm, in random order, and interleave them over every point.

    `arms` are base, head and copy; `blocks` is BLOCKS for many cases and up to MOST_BLOCKS for few. `spin`
    slows the head arm on purpose. Raises WorkerDied when a process of the pair dies: the pair is lost.
    """
    workers: dict[str, Worker] = {}
    try:
        for arm in random.sample(list(arms), len(arms)):
            workers[arm.name] = start(arm, timeout_s, layout)
        cases = [point.key for point in points]
        requests = {arm.name: {point.key: point.request(arm) for point in points} for arm in arms}
        for answer in [w.send("prepare_cases", cases=requests[n], seed=SEED, exact=False) for n, w in workers.items()]:
            for key, row in answer().items():
                if row["status"] != "ok":
                    raise WorkerDied("error", f"{key}: {row['reason']}", None, "build")
        for name, worker in workers.items():  # which also warms every arm alike
            found = worker.ask("calibrate", limit_s=timeout_s * len(cases), keys=cases, block_s=BLOCK_S)
            if name == "base":
                counts.take(found)
        blocks = blocks or _blocks([counts.seconds[key] for key in cases], len(arms))
        own = [worker.process.pid for worker in workers.values()]
        before = host.read(own)
        pair = _interleave_blocks(workers, cases, counts, blocks, spin(counts), timeout_s)
        return replace(pair, disturbed=host.between(before, host.read(own)).total)
    finally:
        for worker in workers.values():
            worker.close()
        if layout:
            layout.settle()


def _interleave_blocks(
    workers: Mapping[str, Worker],
    keys: list[str],
    counts: Counts,
    blocks: int,
    spin: Mapping[str, float],
    timeout_s: float,
) -> Pair:
    times: dict[str, dict[str, list[float]]] = {key: {name: [] for name in workers} for key in keys}
    order = list(workers)
    for _ in range(blocks):
        for key in random.sample(keys, len(keys)):
            random.shuffle(order)
            for name in order:
                spin_s = spin.get(key, 0.0) if name == "head" else 0.0
                count = counts.calls[key]
                seconds = workers[name].ask("block", limit_s=timeout_s, key=key, count=count, spin_s=spin_s)
                if not (isinstance(seconds, float) and 0 < seconds < math.inf):
                    raise WorkerDied(
                        "error", f"{key} took {seconds!r} s in the {name} arm: no time at all", None, "time"
                    )
                times[key][name].append(seconds)
    ratios = {key: _log_ratios(times[key]["head"], times[key]["base"]) for key in keys}
    return Pair(
        head={key: statistics.median(ratios[key]) for key in keys},
        floor={key: statistics.median(_log_ratios(times[key]["copy"], times[key]["base"])) for key in keys},
        seconds={key: statistics.median(times[key]["base"]) for key in keys},
        blocks=ratios,
    )


def _log_ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [math.log(a / b) for a, b in zip(over, under, strict=True)]


def _blocks(seconds: Sequence[float], arms: int) -> int:
    """How many blocks of each case a pair gets; `seconds` per call of the cases."""
    once_s = arms * sum(max(BLOCK_S, each) for each in seconds)
    return min(MOST_BLOCKS, max(BLOCKS, round(PAIR_S / once_s)))


def survey(arm: Arm, impls: Sequence[str], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """What a fresh process of an arm has loaded, and which of these implementations it does not have, with its reason.

    Raises ArmError for an arm that runs something else than it should.
    """
    unknown: dict[str, str] = {}
    with started(arm, timeout_s) as worker:
        loaded: dict[str, Any] = worker.ask("loaded")
        verify(arm, loaded)
        for impl in dict.fromkeys(impls):
            try:
                worker.ask("describe", impls=[arm.impl(impl)])
            except WorkerRefused as error:
                unknown[impl] = str(error)
    kernels = {name: {"digest": kernel.digest, "path": kernel.path} for name, kernel in arm.kernels.items()}
    return loaded | {"interpreter": arm.python, "commit": arm.commit, "kernels": kernels}, unknown


def require_known(unknown: Sequence[Mapping[str, str]]) -> None:
    """Raise ArmError for an implementation that no arm has. `unknown`: implementation -> reason, of each arm."""
    for impl in unknown[0]:
        if all(impl in of_arm for of_arm in unknown):
            raise ArmError(f"neither arm has {impl!r}: {unknown[-1][impl]}")


@contextmanager
def started(arm: Arm, timeout_s: float) -> Iterator[Worker]:
    """A fresh process of an arm to ask, ended afterwards. Raises ArmError, which names the arm, where it dies."""
    worker = start(arm, timeout_s)
    try:
        yield worker
    except WorkerDied as death:
        raise ArmError(f"the {arm.name} arm does not run ({arm.python} in {arm.folder}): {death}") from None
    finally:
        worker.close()


def start(arm: Arm, timeout_s: float, layout: Layout | None = None) -> Worker:
    """A fresh process of an arm. Hash seed and size of the environment differ each time; native code as in `layout`."""
    beside = [os.path.dirname(kernel.path) for kernel in arm.kernels.values()]
    environment = ENVIRONMENT | {
        "PYTHONPATH": str(arm.package_folder),
        clock.BESIDE: os.pathsep.join(dict.fromkeys(beside)),
        "TORCH_EXTENSIONS_DIR": str(arm.extensions),
        "PYTHONHASHSEED": str(random.randrange(1 << 32)),
        EXPORTS: str(arm.exports),
        "SASA_BENCH_PADDING": secrets.token_hex(random.randrange(1, 2048)),
    }
    if layout:
        environment |= layout.environment(arm.name)
    return Worker(timeout_s, (arm.python, "-c", inspect.getsource(clock)), environment, cwd=arm.folder)
