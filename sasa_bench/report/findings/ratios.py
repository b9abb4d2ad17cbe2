"""Times over times with their intervals, and how ratios are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.report.baselines import is_conv3x3
from sasa_bench.results.record import Record
from sasa_bench.results.statistics import may_lie_anywhere, ratio_of_times

ATTENTION, CONVOLUTION = "local_attention", "convolution"
FASTER, SLOWER, CLOSE, UNCERTAIN = VERDICTS = ("faster", "slower", "too close to call", "too uncertain to tell")
"""Of a ratio. The last one: its interval holds 1 and is too wide, or is not known, to call the times close."""


@dataclass(frozen=True)
class Ratio:
    """Time over time, and its 95 % interval, by statistics.ratio_of_times.

    noisy: whether there is no interval because the median of either row may lie anywhere, not because samples are few.
    """

    value: float
    low: float
    high: float
    noisy: bool = False

    def __str__(self) -> str:
        if not np.isfinite(self.high):
            return f"{times(self.value)} ({'too noisy' if self.noisy else 'too few samples for an interval'})"
        return f"{times(self.value)} ({times(self.low)} to {times(self.high)})"

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def known(self) -> bool:
        """Whether the interval is narrow enough to give the ratio as a figure: its ends differ by less than 2 times."""
        return self.high < 2 * self.low

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        if self.decided:
            return FASTER if self.high < 1 else SLOWER
        return CLOSE if self.known else UNCERTAIN


class Point(dict[str, Record]):
    """The ok rows of one case by implementation; `of`: the file and the machine id that they all have."""

    of: tuple[str, ...] = ()


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
    noisy = may_lie_anywhere(a.samples_s) or may_lie_anywhere(b.samples_s)
    return Ratio(*ratio_of_times(a.by_worker, b.by_worker), noisy)


def fastest(point: Mapping[str, Record], op: str = ATTENTION) -> Record | None:
    """The row of `op` with the least median time."""
    found = [record for record in point.values() if record.op == op]
    return min(found, key=lambda record: record.median_s, default=None)


def strongest(point: Mapping[str, Record]) -> Record | None:
    """The 3 x 3 convolution with the least median time: what attention has to beat."""
    found = [record for record in point.values() if is_conv3x3(record)]
    return min(found, key=lambda record: record.median_s, default=None)


def against_strongest(points: Iterable[Point]) -> list[tuple[Record, Record]]:
    """(fastest attention, strongest 3 x 3 convolution) of each point that has both."""
    found = [(fastest(point), strongest(point)) for point in points]
    return [(attention, convolution) for attention, convolution in found if attention and convolution]


def tally(ratios: Sequence[Ratio]) -> list[tuple[str, int]]:
    """(verdict, how many) of ratios, in the order of VERDICTS; none that is 0."""
    counts = Counter(r.verdict for r in ratios)
    return [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]


def case_of(point: Point) -> Case:
    return next(iter(point.values())).case


def middle(ratios: Sequence[Ratio]) -> str:
    return times(float(np.median([r.value for r in ratios])))


def span(values: Iterable[float]) -> str:
    """ "1.9 to 12", or one figure where both ends read alike."""
    found = sorted(values)
    low, high = times(found[0]), times(found[-1])
    return low if low == high else f"{low} to {high}"


def with_window(point: Point) -> list[str]:
    """Convolutions with the window of the case, which their FLOPs tell, where that is not 3 x 3."""
    return [
        name
        for name, r in point.items()
        if r.op == CONVOLUTION and not is_conv3x3(r) and r.flops == ops.get(CONVOLUTION).cost(r.case).flops
    ]


def one_or_span(ratios: Sequence[Ratio]) -> str:
    return str(ratios[0]) if len(ratios) == 1 else span(r.value for r in ratios)
