"""Sentences that answer the questions of the report, by suite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sasa_bench.report.findings.ratios import (
    ATTENTION,
    CLOSE,
    FASTER,
    SLOWER,
    Point,
    Ratio,
    against_strongest,
    case_of,
    fastest,
    ratio,
    span,
    strongest,
    tally,
    times,
    with_window,
)
from sasa_bench.report.panels import Panel
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.record import DIFFERS, ImplInfo, Record

Swept = Sequence[tuple[Panel, list[Point]]]
STRONGEST = "the fastest 3×3 convolution"
MOST_PANELS = 6
"""A suite with more panels than this gets one sentence for all of them instead of one each."""


def which(swept: Swept) -> Iterator[str]:
    """Who is fastest, by region of the sweep, beyond the uncertainty."""
    judged = []
    for panel, points in swept:
        for point in points:
            rivals = {name: r for name, r in point.items() if r.op == ATTENTION}
            if len(rivals) > 1:
                judged.append((panel, point, lead(rivals)))
    if not judged:
        return
    wins = Counter(won.names for _, _, won in judged if won)
    if not wins:
        yield "No implementation of attention is faster than the others beyond the uncertainty."
        return
    names, count = wins.most_common(1)[0]
    ahead = span(won.ahead for _, _, won in judged if won and won.names == names)
    at = _all(count) if count == len(judged) else f"{count} of {len(judged)} points"
    others = [f"{in_words(other)} at {n}" for other, n in wins.most_common()[1:]]
    unclear = len(judged) - sum(wins.values())
    others += [f"{unclear} {'is' if unclear == 1 else 'are'} too close or too uncertain to call"] if unclear else []
    yield "; ".join([f"{are_fastest(names)} at {at}, {ahead} times as fast as the next", *others]) + "."
    if len(swept) <= MOST_PANELS and len(wins) > 1:
        for panel, _ in swept:
            regions = _regions([(point, won) for p, point, won in judged if p is panel], panel.x)
            if len({names for names, _ in regions}) > 1:
                words = ", ".join(f"{in_words(names)} at {values}" for names, values in regions)
                yield f"By {COLUMNS[panel.x].label}{_facet(panel)}: {words}."


def _all(count: int) -> str:
    return f"all {count} points" if count > 1 else "its one point"


def _facet(panel: Panel) -> str:
    return f" ({panel.facet})" if panel.facet else ""


@dataclass(frozen=True)
class Lead:
    """The implementations that are faster than all others, too close to call between them, and how many times."""

    names: tuple[str, ...]
    ahead: float


MOST_TIED = 2
"""Implementations that share a lead; of more none leads."""


def lead(rivals: Mapping[str, Record]) -> Lead | None:
    """Who leads beyond the uncertainty; None where nobody does."""
    ranked = sorted(rivals, key=lambda name: rivals[name].median_s)
    best = rivals[ranked[0]]
    tied = [name for name in ranked[1:] if ratio(best, rivals[name]).verdict == CLOSE]
    behind = [name for name in ranked[1:] if name not in tied]
    if not behind or len(tied) >= MOST_TIED or any(ratio(best, rivals[name]).verdict != FASTER for name in behind):
        return None
    return Lead(tuple(sorted([ranked[0], *tied])), 1 / ratio(best, rivals[behind[0]]).value)


def in_words(names: Sequence[str]) -> str:
    """ "`a`", or "`a` and `b`"."""
    return " and ".join(f"`{name}`" for name in names)


def are_fastest(names: Sequence[str]) -> str:
    """ "`a` is the fastest", or "`a` and `b` (too close to call between them) are the fastest"."""
    if len(names) == 1:
        return f"{in_words(names)} is the fastest"
    return f"{in_words(names)} (too close to call between them) are the fastest"


def _regions(judged: Sequence[tuple[Point, Lead | None]], x: str) -> list[tuple[tuple[str, ...], str]]:
    spans: list[tuple[tuple[str, ...], list[object]]] = []
    for point, won in judged:
        if won is None:
            continue
        value = getattr(case_of(point), x)
        if spans and spans[-1][0] == won.names:
            spans[-1][1].append(value)
        else:
            spans.append((won.names, [value]))
    return [(names, f"{v[0]} to {v[-1]}" if len(v) > 1 else str(v[0])) for names, v in spans]


@dataclass(frozen=True)
class Against:
    """The fastest attention of a point over a convolution: the ratio, who it is, and where along the panel's x."""

    ratio: Ratio
    impl: str
    at: object


def crossings(swept: Swept) -> Iterator[str]:
    """Where along each sweep the fastest attention becomes faster or slower than a convolution."""
    windows = dict.fromkeys(f"`{name}`" for _, points in swept for point in points for name in with_window(point))
    targets = [STRONGEST, *windows]
    for target in targets:
        found = [(panel, list(_against(panel, points, target))) for panel, points in swept]
        every = [(panel, point) for panel, against in found for point in against]
        if not every:
            continue
        ratios = [point.ratio for _, point in every]
        spread = span(r.value for r in ratios)
        counts = dict(tally(ratios))
        faster, slower = (counts.get(verdict, 0) for verdict in (FASTER, SLOWER))
        changes = [change for panel, against in found for change in _crossings_of(panel, against, target)]
        if slower == len(ratios):
            panel, best = min(every, key=lambda item: item[1].ratio.value)
            at = f" at {COLUMNS[panel.x].label} {best.at}{_facet(panel)}" if len(every) > 1 else ""
            yield (
                f"Attention is never faster than {target}: {spread} times its time at {_all(len(every))}; "
                f"closest is `{best.impl}`{at} with {best.ratio} times."
            )
        elif faster == len(ratios):
            yield f"Attention is always faster than {target}: {spread} of its time at {_all(len(every))}."
        elif 0 < len(changes) <= MOST_PANELS:
            yield from changes
        else:
            words = ", ".join(f"{word} at {count}" for word, count in counts.items())
            told = f"; {span(r.value for r in ratios if r.decided)} times its time" if faster + slower else ""
            yield f"Against {target}, of {len(ratios)} points: {words}{told}."


def _against(panel: Panel, points: Sequence[Point], target: str) -> Iterator[Against]:
    for point in points:
        best, other = fastest(point), strongest(point) if target == STRONGEST else point.get(target.strip("`"))
        if best and other:
            yield Against(ratio(best, other), best.impl, getattr(case_of(point), panel.x))


def _crossings_of(panel: Panel, against: Sequence[Against], target: str) -> Iterator[str]:
    for a, b in pairwise([point for point in against if point.ratio.decided]):
        if (a.ratio.value < 1) != (b.ratio.value < 1):
            word = "slower" if b.ratio.value > 1 else "faster"
            yield (
                f"`{b.impl}` becomes {word} than {target} between {COLUMNS[panel.x].label} {a.at} and {b.at}"
                f"{_facet(panel)}: from {a.ratio} to {b.ratio} times its time."
            )


def flops_and_time(swept: Swept) -> Iterator[str]:
    """The ratio that FLOPs alone would give, next to the measured one."""
    found = against_strongest(point for _, points in swept for point in points)
    paired = [(a.flops / b.flops, r.value) for a, b in found if a.flops and b.flops and (r := ratio(a, b)).known]
    if not paired:
        return
    yield (
        f"By its FLOPs, the fastest attention would take {span(work for work, _ in paired)} times as long as "
        f"{STRONGEST}; it takes {span(clock for _, clock in paired)} times as long, which is "
        f"{span(clock / work for work, clock in paired)} times the time per FLOP."
    )


def memory(swept: Swept) -> Iterator[str]:
    """Peak memory of the fastest attention, and the least and the most of any, next to the baseline's."""
    of_fastest, least, most, sparing = [], [], [], []
    for point in (point for _, points in swept for point in points):
        known = {n: r.peak_memory_bytes for n, r in point.items() if r.op == ATTENTION and r.peak_memory_bytes}
        convolution = strongest(point)
        base = convolution.peak_memory_bytes if convolution else None
        best = fastest(point)
        if base and best and best.impl in known:
            sparing.append(min(known, key=lambda name: known[name]))
            of_fastest.append(known[best.impl] / base)
            least.append(min(known.values()) / base)
            most.append(max(known.values()) / base)
    if not sparing:
        return
    yield f"The fastest attention needs {span(of_fastest)} times the peak memory of {STRONGEST}."
    if most != least:
        name, count = Counter(sparing).most_common(1)[0]
        share = "" if count == len(sparing) else f" at {count} of {len(sparing)} points"
        yield (
            f"Of all attention, `{name}` needs the least memory{share}: {span(least)} times that of {STRONGEST}. The "
            f"one that needs the most takes up to {times(max(most))} times."
        )


def others(swept: Swept, impls: Mapping[str, ImplInfo]) -> Iterator[str]:
    """Each implementation of another function next to the fastest attention: compared, never ranked."""
    for name, how in ((info.name, info.differs) for info in impls.values() if info.differs):
        points = [point for _, found in swept for point in found if name in point]
        ratios = [ratio(point[name], best) for point in points if (best := fastest(point))]
        known = [r.value for r in ratios if r.known or r.decided]
        if known:
            said = f"`{name}` {DIFFERS} takes {span(known)} times as long as the fastest attention"
            yield f"{said} at {_all(len(known))}, and computes another function: {how}."
