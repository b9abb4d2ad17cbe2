"""The paper's claims next to the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.ops.local_attention import equal_flops_kernel_size
from sasa_bench.paper.tables import published
from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.findings.ratios import (
    ATTENTION,
    CLOSE,
    FASTER,
    SLOWER,
    UNCERTAIN,
    Point,
    Ratio,
    case_of,
    fastest,
    one_or_span,
    ratio,
    span,
    strongest,
    tally,
    times,
    with_window,
)
from sasa_bench.results.record import Record

PAPER = Case(kernel_size=7)
"""The paper's window; the other fields are the defaults of a case."""
EQUAL_FLOPS = Case(kernel_size=19, channels=128)
"""Where, by the paper, attention costs as many FLOPs as the 3 x 3 convolution."""
HOLDS, FAILS, PARTLY, OPEN = "holds", "does not hold here", "holds in part", "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, whether it holds here (HOLDS, FAILS, PARTLY or OPEN), and the figures.

    one_of_many: whether it is one of a list, a network each, that is read only where it does not hold
    """

    text: str
    verdict: str
    figures: str
    one_of_many: bool = False


def claims(points: Sequence[Point], rows: Sequence[Record]) -> Iterator[Claim]:
    """The paper's claims about layers, then those about whole networks, that the rows can judge."""
    for claim in (_fewer_flops, _fewer_params, _equal_flops, _slower, _slow_growth, _cheap_positions):
        found = claim(points, rows)
        if found:
            yield found
    yield from _leaner_networks(rows)
    yield from _slower_networks(points)


def _is_layer(case: Case) -> bool:
    """Whether it is one layer, which the claims are about, and not the stem of a network."""
    return case.scope == "layer" and case.stem == "none"


def _work(rows: Sequence[Record], kernel_size: int) -> list[tuple[Record, Record]]:
    """(attention, baseline) for each layer with that window, whether or not they ran: the cost model needs no time."""
    layers = [r for r in rows if _is_layer(r.case) and r.case.kernel_size == kernel_size and r.flops]
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
        f"is the largest that fits), {span(shares)} with it, counted"
    )
    clock = [
        ratio(best, base)
        for point in points
        if _is_layer(case_of(point))
        and case_of(point).kernel_size == window
        and case_of(point).channels == width
        and case_of(point).mode == "forward"
        and (best := fastest(point))
        and (base := strongest(point))
    ]
    if clock:
        figures += f". The time: {one_or_span(clock)} times that of the fastest 3×3 convolution"
    near = 0.9 <= core / (18 * width**2) <= 1.1
    return Claim(
        "With 128 channels, a window of 19 costs as many FLOPs as the 3×3 convolution.",
        HOLDS if near else FAILS,
        figures + ".",
    )


def _slower(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    ratios = [
        ratio(best, base)
        for point in points
        if _is_layer(case_of(point))
        and case_of(point).kernel_size == 7
        and (best := fastest(point))
        and (base := strongest(point))
    ]
    text = "It is still slower in wall-clock time, for lack of optimised kernels."
    return _judged_slower(text, "The fastest attention at k = 7", ratios) if ratios else None


def _judged_slower(text: str, who: str, ratios: Sequence[Ratio], rival: str = "the fastest 3×3 convolution") -> Claim:
    counts = dict(tally(ratios))
    slower, faster, close = (counts.get(verdict, 0) for verdict in (SLOWER, FASTER, CLOSE))
    verdict = PARTLY if slower and (faster or close >= slower) else HOLDS if slower else FAILS if faster else OPEN
    if counts.get(UNCERTAIN, 0) > slower + faster:
        verdict = OPEN
    figures = one_or_span([r for r in ratios if r.verdict != UNCERTAIN] or ratios)
    counted = ": " + ", ".join(f"{word} at {n} of {len(ratios)} points" for word, n in counts.items())
    return Claim(text, verdict, f"{who} takes {figures} times as long as {rival}{counted}.")


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
                one_of_many=True,
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
        case, best = case_of(point), fastest(point)
        base = strongest(point)
        if case.scope == "network" and best and base:
            ratios.setdefault(case.stem, []).append(ratio(best, base))
    for stem, found in ratios.items():
        name = stem.replace("_", " ")
        yield _judged_slower(
            f"A network with attention, stem {name}, is still slower, for lack of optimised kernels.",
            "The fastest such network",
            found,
            "the fastest convolutional network",
        )


def _slow_growth(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    """Growth from the smallest to the largest window of attention and of a convolution with that window."""
    groups: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        case = case_of(point)
        if _is_layer(case) and case.mode == "forward" and fastest(point):
            groups.setdefault((case.with_(kernel_size=1), *point.of), []).append(point)
    group = max(groups.values(), key=len, default=[])
    ends = sorted(group, key=lambda point: case_of(point).kernel_size)
    if len(ends) < 2 or case_of(ends[0]).kernel_size == case_of(ends[-1]).kernel_size:
        return None
    small, large = ends[0], ends[-1]
    k, most = case_of(small).kernel_size, case_of(large).kernel_size
    a, b = fastest(small), fastest(large)
    assert a is not None
    assert b is not None
    work = ops.get(ATTENTION).cost(case_of(large)).flops / ops.get(ATTENTION).cost(case_of(small)).flops
    convolution = (most / k) ** 2
    clock = ratio(b, a)
    figures = (
        f"From k = {k} to {most} the FLOPs of attention grow {times(work)} times, those of a convolution "
        f"{times(convolution)} times; the time of the fastest attention grows {clock} times"
    )
    same = [name for name in with_window(large) if name in small]
    verdict = HOLDS if clock.high < convolution else FAILS if clock.low > convolution else OPEN
    if same:
        other = ratio(large[same[0]], small[same[0]])
        figures += f", that of `{same[0]}` {other} times"
        verdict = HOLDS if clock.high < other.low else FAILS if clock.low > other.high else OPEN
    text = "Its cost grows slowly with the window, where a convolution's grows with its square."
    return Claim(text, verdict, figures + ".")


def _cheap_positions(points: Sequence[Point], rows: Sequence[Record]) -> Claim | None:
    by_case = {(case_of(p), p.of): p for p in points if _is_layer(case_of(p)) and fastest(p)}
    work, clock = [], []
    for (case, of), point in by_case.items():
        plain = by_case.get((case.with_(position="none"), of))
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
        f"{span(work)} times the FLOPs without positions, by the paper's count; "
        f"{one_or_span(clock)} times the time without{_over(clock)}.",
    )


def _over(values: Sequence[object]) -> str:
    return f" over {len(values)} cases" if len(values) > 1 else ""
