"""Times over times with their intervals, and how ratios are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.report.baselines import BASELINE
from sasa_bench.results.record import Record
from sasa_bench.results.statistics import interval_of_median

ATTENTION, CONVOLUTION = "local_attention", "convolution"


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


def case_of(point: Point) -> Case:
    return next(iter(point.values())).case


def middle(ratios: Sequence[Ratio]) -> str:
    return times(float(np.median([r.value for r in ratios])))


def span(values: Iterable[float]) -> str:
    """ "1.9 to 12", or one figure where both ends read alike."""
    found = sorted(values)
    low, high = times(found[0]), times(found[-1])
    return low if low == high else f"{low} to {high}"


def convolutions(point: Point) -> list[str]:
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


def one_or_span(ratios: Sequence[Ratio]) -> str:
    return str(ratios[0]) if len(ratios) == 1 else span(r.value for r in ratios)
