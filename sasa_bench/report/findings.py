"""Answers computed from rows: a verdict, sentences by question, the paper's claims; none that rows do not support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd

from sasa_bench import ops
from sasa_bench.case import AXES, Case
from sasa_bench.ops.local_attention import equal_flops_kernel_size
from sasa_bench.paper.tables import published
from sasa_bench.report.figures import Panel, panels
from sasa_bench.report.table import BASELINE
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.format import size
from sasa_bench.results.record import DIFFERS, ImplInfo, Record, Results
from sasa_bench.results.statistics import interval_of_median

ATTENTION, CONVOLUTION = "local_attention", "convolution"
PAPER = Case(kernel_size=7)
"""The paper's window; the other fields are the defaults of a case."""
EQUAL_FLOPS = Case(kernel_size=19, channels=128)
"""Where, by the paper, attention costs as many FLOPs as the 3 x 3 convolution."""

HOLDS, FAILS, PARTLY, OPEN = "holds", "does not hold here", "holds in part", "undecided"


@dataclass(frozen=True)
class Ratio:
    """Median time over median time, and the interval that follows from the 95 % intervals of both medians."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.high):
            return f"{times(self.value)} (too few samples for an interval)"
        return f"{times(self.value)} ({times(self.low)} to {times(self.high)})"

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def known(self) -> bool:
        """Whether the interval is narrow enough to give the ratio as a figure: its ends differ by less than 2 times."""
        return self.high < 2 * self.low


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: attention over the baseline in one respect, and what it was computed from."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, whether it holds here (HOLDS, FAILS, PARTLY or OPEN), and the figures."""

    text: str
    verdict: str
    figures: str


@dataclass
class Answers:
    """What the rows say; names in sentences stand in backticks.

    verdict    one sentence, empty where no row supports one
    tiles      figures at `tile_case`
    groups     question -> suite -> sentences
    claims     of the paper
    """

    verdict: str = ""
    tile_case: str = ""
    tiles: list[Tile] = field(default_factory=list)
    groups: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


Point = dict[str, Record]
"""The ok rows of one case by implementation."""


def times(value: float) -> str:
    """A ratio to two digits, without powers of ten: 0.60, 5.4, 12, 110."""
    if not np.isfinite(value):
        return "∞"
    if value >= 9.95:
        return f"{float(f'{value:.2g}'):,.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2g}".ljust(4, "0")


def ratio(a: Record, b: Record) -> Ratio:
    """Time of `a` over time of `b`."""
    (a_low, a_high), (b_low, b_high) = interval_of_median(a.samples_s), interval_of_median(b.samples_s)
    middle = np.median(a.samples_s) / np.median(b.samples_s)
    return Ratio(float(middle), max(0.0, a_low) / b_high, a_high / b_low if b_low > 0 else float("inf"))


def fastest(point: Point, op: str = ATTENTION) -> Record | None:
    """The row of `op` with the least median time."""
    found = [record for record in point.values() if record.op == op]
    return min(found, key=lambda record: float(np.median(record.samples_s)), default=None)


def answers(results: Results, table: pd.DataFrame) -> Answers:
    """What the rows of one kind of hardware say; `table` is their tidy table."""
    rows = {_key(record): record for record in results.rows if record.status == "ok"}
    swept = [(panel, _points(panel, rows)) for panel in panels(table)]
    points = [point for _, found in swept for point in found]
    paired = [point for point in points if BASELINE in point and fastest(point)]
    distinct: dict[Case, Point] = {}
    for point in points:
        if len(point) >= len(distinct.get(_case(point), ())):
            distinct[_case(point)] = point
    points = list(distinct.values())
    found = Answers(claims=list(_claims(points, results.rows)))
    if paired:
        found.verdict = _verdict(paired)
        _tiles(found, paired)
    questions: dict[str, Callable[[Swept], Iterator[str]]] = {
        "Which implementation of attention?": _which,
        "Where is attention cheaper than convolution?": _crossings,
        "What do the FLOPs promise, and what does the clock say?": _promises,
        "What does it cost in memory?": _memory,
        "What do those cost that compute something else?": lambda swept: _others(swept, results.impls),
    }
    by_suite: dict[str, list[tuple[Panel, list[Point]]]] = {}
    for panel, of_panel in swept:
        by_suite.setdefault(panel.suite, []).append((panel, of_panel))
    for question, answer in questions.items():
        sentences = {suite: list(answer(of_suite)) for suite, of_suite in by_suite.items()}
        if any(sentences.values()):
            found.groups[question] = {suite: said for suite, said in sentences.items() if said}
    return found


def _key(record: Record) -> tuple[object, ...]:
    values = record.case.to_dict() | {"resolution": str(record.case.resolution)}
    return (record.suite, record.impl, *(values[axis] for axis in AXES))


def _points(panel: Panel, rows: dict[tuple[object, ...], Record]) -> list[Point]:
    found = []
    for _, group in panel.data.groupby("x_place"):
        keys = zip(group["suite"], group["impl"], *(group[axis] for axis in AXES), strict=True)
        found.append({str(key[1]): rows[key] for key in keys})
    return found


def _case(point: Point) -> Case:
    return next(iter(point.values())).case


def _usual(points: Sequence[Point]) -> list[Point]:
    """The points to judge by: layers at the paper's window, forward, on the commonest device in the commonest dtype.

    A restriction that would leave nothing is not made.
    """
    kept = list(points)
    for axis, wanted in (
        ("scope", "layer"),
        ("mode", "forward"),
        ("device", None),
        ("dtype", None),
        ("kernel_size", 7),
    ):
        value = wanted or Counter(getattr(_case(p), axis) for p in kept).most_common(1)[0][0]
        kept = [p for p in kept if getattr(_case(p), axis) == value] or kept
    return kept


def _verdict(paired: Sequence[Point]) -> str:
    usual = _usual(paired)
    judged = [(ratio(best, point[BASELINE]), best, point[BASELINE]) for point in usual if (best := fastest(point))]
    clear = [r for r, _, _ in judged if r.decided or r.known]
    windows = {_case(point).kernel_size for point in usual}
    where = "Over all windows" if len(windows) > 1 else f"With a {min(windows)}×{min(windows)} window"
    if windows == {PAPER.kernel_size}:
        where = "At the paper's 7×7 window"
    if not any(r.decided for r in clear):
        return f"{where}, local attention and a 3×3 convolution cannot be told apart by time."
    if all(r.high < 1 for r in clear):
        said = f"{where}, local attention is faster than a 3×3 convolution: it takes {_middle(clear)} of the time"
    else:
        said = f"{where}, local attention takes {_middle(clear)} times as long as a 3×3 convolution"
    if len(clear) > 1:
        said += f" (median of {len(clear)} cases; {span(r.value for r in clear)})"
    if len(clear) < len(judged):
        said += f", {len(judged) - len(clear)} more being too noisy to tell"
    work = [best.flops / base.flops for _, best, base in judged if best.flops and base.flops]
    if work:
        said += f", for {span(work)} of its FLOPs"
    name, wins = Counter(best.impl for _, best, _ in judged).most_common(1)[0]
    if len({n for point in usual for n, r in point.items() if r.op == ATTENTION}) == 1:
        return f"{said}, measured with `{name}`."
    return f"{said}. The fastest is `{name}`" + (f" in {wins} of {len(judged)} cases." if wins < len(judged) else ".")


def _middle(ratios: Sequence[Ratio]) -> str:
    return times(float(np.median([r.value for r in ratios])))


def span(values: Iterable[float]) -> str:
    """ "1.9 to 12", or one figure where both ends read alike."""
    found = sorted(values)
    low, high = times(found[0]), times(found[-1])
    return low if low == high else f"{low} to {high}"


def _tiles(found: Answers, paired: Sequence[Point]) -> None:
    point = max(_usual(paired), key=_nearness)
    best, baseline, case = fastest(point), point[BASELINE], _case(point)
    assert best is not None
    time = ratio(best, baseline)
    found.tile_case = (
        f"{best.impl} over {BASELINE} at k = {case.kernel_size}, {case.channels} channels, {case.height}×{case.width}, "
        f"batch {case.batch}, {case.dtype}, {case.mode}"
    )
    note = f"95 %: {times(time.low)} to {times(time.high)}" if np.isfinite(time.high) else "too few samples for 95 %"
    found.tiles.append(Tile("time", f"{times(time.value)}×" if time.known else "too noisy", note))
    if best.flops and baseline.flops:
        found.tiles.append(Tile("FLOPs", f"{times(best.flops / baseline.flops)}×", "by the cost model"))
    if best.params and baseline.params:
        found.tiles.append(Tile("parameters", f"{times(best.params / baseline.params)}×", "by the cost model"))
    if best.peak_memory_bytes and baseline.peak_memory_bytes:
        more = best.peak_memory_bytes / baseline.peak_memory_bytes
        note = f"{size(best.peak_memory_bytes)} against {size(baseline.peak_memory_bytes)}"
        found.tiles.append(Tile("peak memory", f"{times(more)}×", note))


def _nearness(point: Point) -> int:
    case, usual = _case(point).to_dict(), PAPER.to_dict()
    return sum(case[axis] == usual[axis] for axis in AXES)


Swept = Sequence[tuple[Panel, list[Point]]]
MOST_PANELS = 6
"""A suite with more panels than this gets one sentence for all of them instead of one each."""


def _which(swept: Swept) -> Iterator[str]:
    """Who is fastest, by region of the sweep, beyond the uncertainty."""
    judged = []
    for panel, points in swept:
        for point in points:
            rivals = {name: r for name, r in point.items() if r.op == ATTENTION}
            if len(rivals) > 1:
                judged.append((panel, point, _winner(rivals)))
    if not judged:
        return
    wins = Counter(winner[0] for _, _, winner in judged if winner)
    if not wins:
        yield "No implementation of attention is faster than the others beyond the uncertainty."
        return
    name, count = wins.most_common(1)[0]
    lead = span(winner[1] for _, _, winner in judged if winner and winner[0] == name)
    if count == len(judged):
        yield f"`{name}` is the fastest at {_all(count)}, {lead} times as fast as the next."
        return
    others = [f"`{other}` at {n}" for other, n in wins.most_common()[1:]]
    close = len(judged) - sum(wins.values())
    others += [f"{close} {'is' if close == 1 else 'are'} too close to call"] if close else []
    said = f"`{name}` is the fastest at {count} of {len(judged)} points, {lead} times as fast as the next"
    yield f"{said}; {', '.join(others)}."
    if len(swept) <= MOST_PANELS and len(wins) > 1:
        for panel, _ in swept:
            regions = _regions([(point, winner) for p, point, winner in judged if p is panel], panel.x)
            if len({name for name, _ in regions}) > 1:
                words = ", ".join(f"`{name}` at {values}" for name, values in regions)
                yield f"By {COLUMNS[panel.x].label}{_facet(panel)}: {words}."


def _all(count: int) -> str:
    return f"all {count} points" if count > 1 else "its one point"


def _facet(panel: Panel) -> str:
    return f" ({panel.facet})" if panel.facet else ""


def _winner(rivals: Point) -> tuple[str, float] | None:
    """The implementation that is faster than every other beyond the uncertainty, and how many times; None for none."""
    ranked = sorted(rivals, key=lambda name: float(np.median(rivals[name].samples_s)))
    best = ranked[0]
    if all(ratio(rivals[best], rivals[name]).high < 1 for name in ranked[1:]):
        return best, 1 / ratio(rivals[best], rivals[ranked[1]]).value
    return None


def _regions(judged: Sequence[tuple[Point, tuple[str, float] | None]], x: str) -> list[tuple[str, str]]:
    spans: list[tuple[str, list[object]]] = []
    for point, winner in judged:
        if winner is None:
            continue
        value = getattr(_case(point), x)
        if spans and spans[-1][0] == winner[0]:
            spans[-1][1].append(value)
        else:
            spans.append((winner[0], [value]))
    return [(name, f"{v[0]} to {v[-1]}" if len(v) > 1 else str(v[0])) for name, v in spans]


@dataclass(frozen=True)
class Against:
    """The fastest attention of a point over a convolution: the ratio, who it is, and where along the panel's x."""

    ratio: Ratio
    impl: str
    at: object


def _crossings(swept: Swept) -> Iterator[str]:
    """Where along each sweep the fastest attention turns cheaper or dearer than a convolution."""
    targets = list(dict.fromkeys(name for _, points in swept for point in points for name in _convolutions(point)))
    for target in targets:
        found = [(panel, list(_against(panel, points, target))) for panel, points in swept]
        every = [(panel, point) for panel, against in found for point in against]
        if not every:
            continue
        ratios = [point.ratio for _, point in every]
        spread = span(r.value for r in ratios)
        cheaper, dearer = sum(r.high < 1 for r in ratios), sum(r.low > 1 for r in ratios)
        turns = [turn for panel, against in found for turn in _turns(panel, against, target)]
        if dearer == len(ratios):
            panel, best = min(every, key=lambda item: item[1].ratio.value)
            at = f" at {COLUMNS[panel.x].label} {best.at}{_facet(panel)}" if len(every) > 1 else ""
            yield (
                f"Never cheaper than `{target}`: {spread} times its time at {_all(len(every))}; "
                f"nearest is `{best.impl}`{at} with {best.ratio} times."
            )
        elif cheaper == len(ratios):
            yield f"Always cheaper than `{target}`: {spread} of its time at {_all(len(every))}."
        elif 0 < len(turns) <= MOST_PANELS:
            yield from turns
        else:
            counts = [(cheaper, "cheaper"), (dearer, "dearer"), (len(ratios) - cheaper - dearer, "too close to call")]
            words = ", ".join(f"{word} at {count}" for count, word in counts if count)
            told = f"; {span(r.value for r in ratios if r.decided)} times its time" if cheaper + dearer else ""
            yield f"Against `{target}`, of {len(ratios)} points: {words}{told}."


def _convolutions(point: Point) -> list[str]:
    """The baseline, and convolutions with the window of the case, which their FLOPs tell."""
    same = [
        name
        for name, r in point.items()
        if r.op == CONVOLUTION
        and name != BASELINE
        and r.case.kernel_size != 3
        and r.flops == ops.get(CONVOLUTION).cost(r.case).flops
    ]
    return [BASELINE, *same] if BASELINE in point else same


def _against(panel: Panel, points: Sequence[Point], target: str) -> Iterator[Against]:
    for point in points:
        best = fastest(point)
        if best and target in point:
            yield Against(ratio(best, point[target]), best.impl, getattr(_case(point), panel.x))


def _turns(panel: Panel, against: Sequence[Against], target: str) -> Iterator[str]:
    for a, b in pairwise([point for point in against if point.ratio.decided]):
        if (a.ratio.value < 1) != (b.ratio.value < 1):
            turn = "dearer" if b.ratio.value > 1 else "cheaper"
            yield (
                f"`{b.impl}` becomes {turn} than `{target}` between {COLUMNS[panel.x].label} {a.at} and {b.at}"
                f"{_facet(panel)}: from {a.ratio} to {b.ratio} times its time."
            )


def _promises(swept: Swept) -> Iterator[str]:
    """The ratio that FLOPs alone would give, next to the measured one."""
    found = [(best, p[BASELINE]) for _, points in swept for p in points if BASELINE in p and (best := fastest(p))]
    paired = [(a.flops / b.flops, r.value) for a, b in found if a.flops and b.flops and (r := ratio(a, b)).known]
    if not paired:
        return
    yield (
        f"By FLOPs, attention would take {span(work for work, _ in paired)} of the time of `{BASELINE}`; the fastest "
        f"takes {span(clock for _, clock in paired)} times it. So each of its FLOPs takes "
        f"{span(clock / work for work, clock in paired)} times as long."
    )


def _memory(swept: Swept) -> Iterator[str]:
    """Peak memory of the fastest and of the leanest attention next to the baseline's."""
    of_fastest, of_leanest, of_largest, leanest = [], [], [], []
    for point in (point for _, points in swept for point in points):
        known = {n: r.peak_memory_bytes for n, r in point.items() if r.op == ATTENTION and r.peak_memory_bytes}
        base = point[BASELINE].peak_memory_bytes if BASELINE in point else None
        best = fastest(point)
        if base and best and best.impl in known:
            leanest.append(min(known, key=lambda name: known[name]))
            of_fastest.append(known[best.impl] / base)
            of_leanest.append(min(known.values()) / base)
            of_largest.append(max(known.values()) / base)
    if not leanest:
        return
    name, count = Counter(leanest).most_common(1)[0]
    said = f"The fastest attention needs {span(of_fastest)} times the peak memory of `{BASELINE}`"
    if of_largest != of_leanest:
        share = "" if count == len(leanest) else f" at {count} of {len(leanest)} points"
        said += f"; the leanest (`{name}`{share}) {span(of_leanest)} times, the largest up to {times(max(of_largest))}"
    yield said + "."


def _others(swept: Swept, impls: Mapping[str, ImplInfo]) -> Iterator[str]:
    """Each implementation of another function next to the fastest attention: compared, never ranked."""
    for name, how in ((info.name, info.differs) for info in impls.values() if info.differs):
        points = [point for _, found in swept for point in found if name in point]
        ratios = [ratio(point[name], best) for point in points if (best := fastest(point))]
        known = [r.value for r in ratios if r.known or r.decided]
        if known:
            said = f"`{name}` {DIFFERS} takes {span(known)} times as long as the fastest attention"
            yield f"{said} at {_all(len(known))}, and computes another function: {how}."


def _claims(points: Sequence[Point], rows: Sequence[Record]) -> Iterator[Claim]:
    """The paper's claims about layers, then those about whole networks, that the rows can judge."""
    for claim in (_fewer_flops, _fewer_params, _equal_flops, _slower, _slow_growth, _cheap_positions):
        found = claim(points, rows)
        if found:
            yield found
    yield from _leaner_networks(rows)
    yield from _slower_networks(points)


def _work(rows: Sequence[Record], kernel_size: int) -> list[tuple[Record, Record]]:
    """(attention, baseline) for each layer with that window, whether or not they ran: the cost model needs no time."""
    layers = [r for r in rows if r.case.scope == "layer" and r.case.kernel_size == kernel_size and r.flops]
    base = {r.case: r for r in layers if r.impl == BASELINE}
    attention = {r.case: r for r in layers if r.op == ATTENTION}
    return [(r, base[case]) for case, r in attention.items() if case in base]


def _judged(shares: Sequence[bool]) -> str:
    return HOLDS if all(shares) else PARTLY if any(shares) else FAILS


def _fewer_flops(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    shares = [a.flops / b.flops for a, b in _work(rows, 7) if a.flops and b.flops]
    if not shares:
        return None
    return Claim(
        "At k = 7 a layer of attention needs fewer FLOPs than a 3×3 convolution of the same width.",
        _judged([share < 1 for share in shares]),
        f"{span(shares)} of the FLOPs{_over(shares)}, by the cost model.",
    )


def _fewer_params(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    shares = [a.params / b.params for a, b in _work(rows, 7) if a.params and b.params]
    if not shares:
        return None
    return Claim(
        "At k = 7 it has fewer parameters.",
        _judged([share < 1 for share in shares]),
        f"{span(shares)} of the parameters{_over(shares)}, by the cost model.",
    )


def _equal_flops(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    window, width = EQUAL_FLOPS.kernel_size, EQUAL_FLOPS.channels
    pairs = [(a, b) for a, b in _work(rows, window) if a.case.channels == width]
    shares = [a.flops / b.flops for a, b in pairs if a.flops and b.flops]
    if not shares:
        return None
    # The paper's formula leaves the position term out: with it the layer costs more, and the figure says so.
    core = 6 * width**2 + 4 * window**2 * width
    figures = (
        f"{times(core / (18 * width**2))} of the FLOPs without the position term (k = {equal_flops_kernel_size(width)} "
        f"is the largest that fits), {span(shares)} as measured here"
    )
    clock = [
        ratio(best, point[BASELINE])
        for point in points
        if _case(point).kernel_size == window
        and _case(point).channels == width
        and _case(point).mode == "forward"
        and BASELINE in point
        and (best := fastest(point))
    ]
    if clock:
        figures += f". The time: {_one_orspan(clock)} times"
    near = 0.9 <= core / (18 * width**2) <= 1.1
    return Claim(
        "With 128 channels, a window of 19 costs as many FLOPs as the 3×3 convolution.",
        HOLDS if near else FAILS,
        figures + ".",
    )


def _slower(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    ratios = [
        ratio(best, point[BASELINE])
        for point in points
        if _case(point).scope == "layer"
        and _case(point).kernel_size == 7
        and BASELINE in point
        and (best := fastest(point))
    ]
    text = "For want of optimised kernels it is slower in wall-clock time all the same."
    return _judged_slower(text, "The fastest attention at k = 7", ratios) if ratios else None


def _judged_slower(text: str, who: str, ratios: Sequence[Ratio]) -> Claim:
    slower, faster = sum(r.low > 1 for r in ratios), sum(r.high < 1 for r in ratios)
    verdict = PARTLY if slower and faster else HOLDS if slower else FAILS if faster else OPEN
    figures = _one_orspan(ratios)
    counts = ((slower, "slower"), (faster, "faster"), (len(ratios) - slower - faster, "too close to call"))
    counted = ": " + ", ".join(f"{word} at {n} of {len(ratios)} points" for n, word in counts if n)
    return Claim(text, verdict, f"{who} takes {figures} times as long{counted}.")


def _leaner_networks(rows: Sequence[Record]) -> Iterator[Claim]:
    """FLOPs and parameters of each published network with attention that has rows, next to its convolutional one.

    What the paper gives for both networks is taken from its tables; where it is not less with attention, nothing is
    claimed.
    """
    printed: dict[tuple[Case, str], str] = {}
    for cell in published():
        printed.setdefault((cell.case, cell.quantity), cell.paper)
    networks = [r for r in rows if r.case.scope == "network"]
    base = {r.case: r for r in networks if r.impl == BASELINE}
    seen = set()
    for record in networks:
        case = _as_published(record.case)
        other = base.get(record.case)
        if record.op != ATTENTION or other is None or case in seen:
            continue
        seen.add(case)
        plain = case.with_(stem="conv", attention_groups="none")
        said, figures, shares = [], [], []
        for quantity, words, unit in (("flops", "FLOPs", "B"), ("params", "parameters", "M")):
            mine, its = getattr(record, quantity), getattr(other, quantity)
            with_attention, without = printed.get((case, quantity)), printed.get((plain, quantity))
            if mine and its and with_attention and without and float(with_attention) < float(without):
                said.append(f"fewer {words} ({with_attention} for {without} {unit})")
                figures.append(f"{times(mine / its)} of the {words}")
                shares.append(mine / its < 1)
        if said:
            yield Claim(
                f"{_named(case)} needs {' and '.join(said)} than with convolutions.",
                _judged(shares),
                f"{', '.join(figures)}, by the cost model.",
            )


def _as_published(case: Case) -> Case:
    """The forward pass of one image on the CPU in float32, as the cases of the paper's tables."""
    return case.with_(batch=1, mode="forward", dtype=PAPER.dtype, device=PAPER.device, threads=PAPER.threads)


def _named(case: Case) -> str:
    return f"{case.network} with attention in groups {case.attention_groups}, stem {case.stem.replace('_', ' ')},"


def _slower_networks(points: Sequence[Point]) -> Iterator[Claim]:
    """The time of networks with attention over that of their convolutional counterparts, by stem."""
    ratios: dict[str, list[Ratio]] = {}
    for point in points:
        case, best = _case(point), fastest(point)
        if case.scope == "network" and best and BASELINE in point:
            ratios.setdefault(case.stem, []).append(ratio(best, point[BASELINE]))
    for stem, found in ratios.items():
        name = stem.replace("_", " ")
        yield _judged_slower(
            f"A network with attention, stem {name}, is slower all the same for want of optimised kernels.",
            "The fastest",
            found,
        )


def _slow_growth(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    """Growth from the smallest to the largest window of attention and of a convolution with that window."""
    groups: dict[Case, list[Point]] = {}
    for point in points:
        case = _case(point)
        if case.scope == "layer" and case.mode == "forward" and fastest(point):
            groups.setdefault(case.with_(kernel_size=1), []).append(point)
    group = max(groups.values(), key=len, default=[])
    ends = sorted(group, key=lambda point: _case(point).kernel_size)
    if len(ends) < 2 or _case(ends[0]).kernel_size == _case(ends[-1]).kernel_size:
        return None
    small, large = ends[0], ends[-1]
    k, most = _case(small).kernel_size, _case(large).kernel_size
    a, b = fastest(small), fastest(large)
    assert a is not None
    assert b is not None
    work = ops.get(ATTENTION).cost(_case(large)).flops / ops.get(ATTENTION).cost(_case(small)).flops
    convolution = (most / k) ** 2
    clock = ratio(b, a)
    figures = (
        f"From k = {k} to {most} the FLOPs of attention grow {times(work)} times, those of a convolution "
        f"{times(convolution)} times; the time of the fastest attention grows {clock} times"
    )
    same = [name for name in _convolutions(large) if name != BASELINE and name in small]
    verdict = HOLDS if clock.high < convolution else FAILS if clock.low > convolution else OPEN
    if same:
        other = ratio(large[same[0]], small[same[0]])
        figures += f", that of `{same[0]}` {other} times"
        verdict = HOLDS if clock.high < other.low else FAILS if clock.low > other.high else OPEN
    text = "Its cost grows slowly with the window, where a convolution's grows with its square."
    return Claim(text, verdict, figures + ".")


def _cheap_positions(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    by_case = {_case(p): p for p in points if _case(p).scope == "layer" and fastest(p)}
    work, clock = [], []
    for case, point in by_case.items():
        plain = by_case.get(case.with_(position="none"))
        a, b = fastest(point), fastest(plain) if plain else None
        if case.position == "relative" and a and b:
            work.append(ops.get(ATTENTION).cost(case).flops / ops.get(ATTENTION).cost(b.case).flops)
            clock.append(ratio(a, b))
    if not clock:
        return None
    cheap = [r.high < 1.1 for r in clock]
    dear = [r.low > 1.1 for r in clock]
    return Claim(
        "Relative positions cost little (at most a tenth).",
        HOLDS if all(cheap) else FAILS if all(dear) else PARTLY if any(dear) and any(cheap) else OPEN,
        f"{span(work)} times the FLOPs of no positions by the paper's count; "
        f"{_one_orspan(clock)} times the time of the fastest{_over(clock)}.",
    )


def _one_orspan(ratios: Sequence[Ratio]) -> str:
    return str(ratios[0]) if len(ratios) == 1 else span(r.value for r in ratios)


def _over(values: Sequence[object]) -> str:
    return f" over {len(values)} cases" if len(values) > 1 else ""
