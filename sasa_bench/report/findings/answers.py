"""Answers computed from rows: a verdict, figures, sentences by question, claims; none that rows do not support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from sasa_bench.case import AXES, Case
from sasa_bench.report.baselines import apart, is_conv3x3
from sasa_bench.report.findings.claims import PAPER, Claim, claims
from sasa_bench.report.findings.questions import (
    Swept,
    are_fastest,
    crossings,
    flops_and_time,
    lead,
    memory,
    others,
    which,
)
from sasa_bench.report.findings.ratios import (
    ATTENTION,
    Point,
    Ratio,
    against_strongest,
    case_of,
    middle,
    ratio,
    span,
    times,
)
from sasa_bench.report.panels import Panel, panels
from sasa_bench.results.format import size
from sasa_bench.results.record import Record, Results
from sasa_bench.results.statistics import NOISY


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: attention over the fastest 3 x 3 convolution, and what it was computed from."""

    label: str
    value: str
    note: str


@dataclass
class Answers:
    """What the rows say; names in sentences stand in backticks.

    verdict    one sentence, empty where no row supports one
    compared   what the verdict knows: implementations of attention and 3 x 3 convolutions that the rows hold
    tiles      figures at `tile_case`
    groups     question -> suite -> sentences
    claims     of the paper
    """

    verdict: str = ""
    compared: str = ""
    tile_case: str = ""
    tiles: list[Tile] = field(default_factory=list)
    groups: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


def answers(results: Results, table: pd.DataFrame) -> Answers:
    """What the rows of one kind of hardware say; `table` is their tidy table."""
    swept = [(panel, _points(panel, results)) for panel in panels(table)]
    points = [point for _, found in swept for point in found]
    paired = _distinct([point for point in points if against_strongest([point])])
    points = _distinct(points)
    found = Answers(claims=list(claims(points, results.rows)))
    if paired:
        found.verdict = _verdict(paired)
        found.compared = _measured(paired)
        _tiles(found, paired)
    questions: dict[str, Callable[[Swept], Iterator[str]]] = {
        "Which implementation of attention?": which,
        "Where is attention faster than convolution?": crossings,
        "What do FLOPs predict, and what was measured?": flops_and_time,
        "What does it cost in memory?": memory,
        "What do layers that compute something else cost?": lambda swept: others(swept, results.impls),
    }
    by_suite: dict[str, list[tuple[Panel, list[Point]]]] = {}
    for panel, of_panel in swept:
        by_suite.setdefault(panel.suite, []).append((panel, of_panel))
    for question, answer in questions.items():
        sentences = {suite: list(_by_scope(answer, of_suite)) for suite, of_suite in by_suite.items()}
        if any(sentences.values()):
            found.groups[question] = {suite: said for suite, said in sentences.items() if said}
    return found


def _measured(points: Sequence[Point]) -> str:
    rows = [row for point in points for row in point.values()]
    attention = sorted({row.impl for row in rows if row.op == ATTENTION})
    convolutions = sorted({row.impl for row in rows if is_conv3x3(row)})
    names = (", ".join(f"`{name}`" for name in found) for found in (attention, convolutions))
    return "Measured here: attention by {}; 3×3 convolutions by {}.".format(*names)


def _distinct(points: Sequence[Point]) -> list[Point]:
    """The points of distinct cases; of a case that several suites hold the one with the most implementations."""
    found: dict[Case, Point] = {}
    for point in points:
        if len(point) >= len(found.get(case_of(point), ())):
            found[case_of(point)] = point
    return list(found.values())


def _by_scope(answer: Callable[[Swept], Iterator[str]], swept: Swept) -> Iterator[str]:
    """The sentences of an answer; of a suite with several scopes those of each, as its cost is that of other work."""
    scopes = list(dict.fromkeys(case_of(point).scope for _, points in swept for point in points))
    if len(scopes) < 2:
        yield from answer(swept)
        return
    for scope in scopes:
        kept = [(panel, [point for point in points if case_of(point).scope == scope]) for panel, points in swept]
        for sentence in answer([(panel, points) for panel, points in kept if points]):
            yield f"At scope {scope}: {sentence}"


def _points(panel: Panel, results: Results) -> list[Point]:
    """The points of a panel along its axis: of each file and machine id its own, since nothing else was interleaved.

    A network without attention is none: whoever runs it, it is the convolutional one.
    """
    found: dict[tuple[object, ...], Point] = {}
    for position in map(int, panel.data.index):
        row, of = results.rows[position], apart(results, position)
        if not row.case.has_attention:
            continue
        point = found.setdefault((row.case, *of), Point())
        point.of = of
        point[row.impl] = row
    return list(found.values())


def _usual(points: Sequence[Point]) -> list[Point]:
    """The points to judge by: layers at the paper's window, forward, on the commonest device in the commonest dtype.

    Without layers: of the commonest scope. Any other restriction that would leave nothing is not made.
    """
    scopes = Counter(case_of(point).scope for point in points)
    scope = "layer" if "layer" in scopes else scopes.most_common(1)[0][0]
    kept = [point for point in points if case_of(point).scope == scope]
    for axis, wanted in (
        ("mode", "forward"),
        ("device", None),
        ("dtype", None),
        ("kernel_size", 7),
    ):
        value = wanted or Counter(getattr(case_of(p), axis) for p in kept).most_common(1)[0][0]
        kept = [p for p in kept if getattr(case_of(p), axis) == value] or kept
    return kept


def _verdict(paired: Sequence[Point]) -> str:
    usual = _usual(paired)
    judged = [(ratio(best, base), best, base) for best, base in against_strongest(usual)]
    clear = [r for r, _, _ in judged if r.decided or r.known]
    unclear = [r for r, _, _ in judged if not (r.decided or r.known)]
    windows = {case_of(point).kernel_size for point in usual}
    where = "Over all windows" if len(windows) > 1 else f"With a {min(windows)}×{min(windows)} window"
    if windows == {PAPER.kernel_size}:
        where = "At the paper's 7×7 window"
    if all(not np.isfinite(r.high) and not r.noisy for r, _, _ in judged):
        return f"{where}, there are too few samples to compare local attention with the fastest 3×3 convolution."
    if not any(r.decided for r in clear):
        return f"{where}, local attention and the fastest 3×3 convolution cannot be distinguished by time."
    pairs = [(best, base) for r, best, base in judged if r.decided or r.known]
    said = _compared(where, clear, unclear, pairs)
    attention = [{n: r for n, r in point.items() if r.op == ATTENTION} for point in usual]
    names = list(dict.fromkeys(name for rivals in attention for name in rivals))
    if len(names) == 1:
        return f"{said}, measured with `{names[0]}`."
    first = Counter(
        leading
        for rivals, (r, _, _) in zip(attention, judged, strict=True)
        if (r.decided or r.known) and (leading := _first(rivals))
    )
    if not first:
        return f"{said}. Which implementation is the fastest is too close to call."
    most, wins = first.most_common(1)[0]
    return f"{said}. {are_fastest(most)}" + (f" in {wins} of {len(clear)} cases." if wins < len(clear) else ".")


def _compared(
    where: str, clear: Sequence[Ratio], unclear: Sequence[Ratio], pairs: Sequence[tuple[Record, Record]]
) -> str:
    """Attention against the convolution over the clear ratios; where most are unclear, that they are comes first."""
    rival, words = "the fastest 3×3 convolution", "case" if len(clear) == 1 else "cases"
    if len(unclear) > len(clear):
        return (
            f"{where}, {len(unclear)} of {len(clear) + len(unclear)} cases are too noisy, or have too few samples, to "
            f"compare local attention with {rival}; in the other {words} it takes {span(r.value for r in clear)} "
            "times as long"
        )
    if all(r.high < 1 for r in clear):
        said = f"{where}, local attention is faster than {rival}: it takes {middle(clear)} of the time"
    else:
        said = f"{where}, local attention takes {middle(clear)} times as long as {rival}"
    if len(clear) > 1:
        said += f" (median of {len(clear)} cases; {span(r.value for r in clear)})"
    if unclear:
        noisy = any(r.noisy or np.isfinite(r.high) for r in unclear)
        more = f", {len(unclear)} more {'case' if len(unclear) == 1 else 'cases'}"
        said += f"{more} being too noisy to tell" if noisy else f"{more} with too few samples"
    work = [best.flops / base.flops for best, base in pairs if best.flops and base.flops]
    return f"{said}, for {span(work)} of its FLOPs" if work else said


def _first(rivals: Mapping[str, Record]) -> tuple[str, ...]:
    """The only one, or those that lead; none where nobody does."""
    if len(rivals) == 1:
        return tuple(rivals)
    won = lead(rivals)
    return won.names if won else ()


def _tiles(found: Answers, paired: Sequence[Point]) -> None:
    point = max(_usual(paired), key=_nearness)
    ((best, baseline),) = against_strongest([point])
    case = case_of(point)
    time = ratio(best, baseline)
    found.tile_case = (
        f"{best.impl} over {baseline.impl} at k = {case.kernel_size}, {case.channels} channels, "
        f"{case.height}×{case.width}, "
        f"batch {case.batch}, {case.dtype}, {case.mode}"
    )
    note = f"95 %: {times(time.low)} to {times(time.high)}" if np.isfinite(time.high) else "too few samples for 95 %"
    unknown = "too noisy" if time.noisy or np.isfinite(time.high) else "unknown"
    note = f"samples scatter: the 95 % interval of a median spans more than {NOISY:g}×" if time.noisy else note
    found.tiles.append(Tile("time", f"{times(time.value)}×" if time.known else unknown, note))
    if best.flops and baseline.flops:
        found.tiles.append(Tile("FLOPs", f"{times(best.flops / baseline.flops)}×", "by the cost model"))
    if best.params and baseline.params:
        found.tiles.append(Tile("parameters", f"{times(best.params / baseline.params)}×", "by the cost model"))
    if best.peak_memory_bytes and baseline.peak_memory_bytes:
        more = best.peak_memory_bytes / baseline.peak_memory_bytes
        note = f"{size(best.peak_memory_bytes)} against {size(baseline.peak_memory_bytes)}"
        found.tiles.append(Tile("peak memory", f"{times(more)}×", note))


def _nearness(point: Point) -> int:
    case, usual = case_of(point).to_dict(), PAPER.to_dict()
    return sum(case[axis] == usual[axis] for axis in AXES)
