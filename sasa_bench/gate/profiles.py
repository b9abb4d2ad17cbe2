"""Where the time of a flagged case goes in base and in head: a profile of each arm, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_bench.gate.arms import Arm
from sasa_bench.gate.pairs import Point, start
from sasa_bench.gate.verdicts import IMPROVED, REGRESSION, CaseVerdict
from sasa_bench.profiling import breakdown, trace
from sasa_bench.profiling.compared import Match, match, sentences
from sasa_bench.profiling.page import stage_shares
from sasa_bench.timing.process import WorkerDied, WorkerRefused

MOST = 12
"""Cases of a run that are profiled, the slowest first."""


@dataclass(frozen=True)
class Profile:
    """A case in both arms.

    key      of the case
    reason   why there is no profile; "" where there is one
    said     what differs, in sentences
    matches  operators of both arms, the largest change first
    stages   rows of impl ("base" or "head"), stage, ms and share; none where the implementation is one operator
    times_s  arm -> seconds of a call without the profiler
    traces   arm -> path of its Chrome trace
    """

    key: str
    reason: str = ""
    said: Sequence[str] = ()
    matches: Sequence[Match] = ()
    stages: Sequence[dict[str, Any]] = ()
    times_s: dict[str, float] | None = None
    traces: dict[str, Path] | None = None


def to_profile(cases: Sequence[CaseVerdict]) -> list[str]:
    """The keys of the cases whose time is worth a look, the slowest first: at most MOST."""
    flagged = [case for case in cases if case.verdict in (REGRESSION, IMPROVED)]
    slowest = sorted(flagged, key=lambda case: (case.verdict != REGRESSION, -(case.ratio or 0.0)))
    return [case.key for case in slowest[:MOST]]


def profile(
    arms: Sequence[Arm],
    points: Sequence[Point],
    folder: Path,
    timeout_s: float,
    say: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> list[Profile]:
    """Profile the points in base and in head, one fresh process an arm; traces go to `folder`."""
    base, head = arms[:2]
    found: dict[str, list[dict[str, Any] | str]] = {point.key: [] for point in points}
    for place, arm in enumerate((base, head)):
        worker = None
        for number, point in enumerate(points):
            say("profiles", place * len(points) + number, 2 * len(points))
            worker = worker or start(arm, timeout_s)
            own = folder.absolute() / str(number) / arm.name
            impl, fields = point.request(arm)
            try:
                found[point.key].append(
                    worker.ask("profile", impl=impl, case=fields, folder=str(own)) | {"folder": str(own)}
                )
            except WorkerRefused as refused:
                found[point.key].append(f"{arm.name}: {refused}")
            except WorkerDied as died:
                found[point.key].append(f"{arm.name}: {died}")
                worker.close()
                worker = None
        if worker:
            worker.close()
    return [_compared(key, *both) for key, both in found.items()]


def _compared(key: str, base: dict[str, Any] | str, head: dict[str, Any] | str) -> Profile:
    for failed in (base, head):
        if isinstance(failed, str):
            return Profile(key, failed)
    assert not isinstance(base, str)
    assert not isinstance(head, str)
    both = {"base": base, "head": head}
    traces = {name: Path(about["folder"]) / about["trace"] for name, about in both.items()}
    try:
        before, after = (
            breakdown.operators(trace.read(traces[name], about["calls"]), about["flops"])
            for name, about in both.items()
        )
        stages = [
            row for name, about in both.items() for row in stage_shares(Path(about["folder"]), [about | {"name": name}])
        ]
    except trace.TraceError as error:
        return Profile(key, str(error))
    except KeyError as error:
        return Profile(key, f"the profile of one arm, of another revision, has no {error}")
    matches = match(before, after)
    times = {name: about["time_s"] for name, about in both.items()}
    return Profile(key, "", sentences(matches, "base", "head"), matches, stages, times, traces)
