"""The statistics of the gate: locations, bounds and levels of paired log ratios; nothing here knows a case."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

BIAS_FACTOR = 2 * math.sqrt(3 / 4)
"""What copy / base differs by is doubled for safety; head over both bases has 3/4 of its variance."""


def against_both(head: Sequence[float], copy: Sequence[float]) -> list[float]:
    """Log ratios of head to the geometric mean of base and its copy, from those of head and of copy to base alone.

    Two processes that are base instead of one: where processes scatter alike, three quarters of the variance.
    """
    return [h - c / 2 for h, c in zip(head, copy, strict=True)]


def location(ratios: Sequence[float]) -> float:
    """The median of the Walsh averages (Hodges and Lehmann 1963), the estimate that goes with the signed-rank test.

    It has 3 / pi of the efficiency of the mean on normal values, a median 2 / pi, and bears 29 % of outliers.
    """
    return float(np.median(_walsh_averages(ratios)))


def _walsh_averages(values: Sequence[float]) -> np.ndarray:
    own = np.asarray(values)
    first, second = np.triu_indices(len(own))
    averages: np.ndarray = (own[first] + own[second]) / 2
    return averages


def detectable(ratios: Sequence[float], pairs: int, threshold: float) -> float:
    """The log slow-down whose location over `pairs` exceeds `threshold` nine times in ten, at the scatter of `ratios`.

    The location of n normal values scatters by sqrt(pi / 3 n) of their standard deviation, estimated from the MAD.
    """
    scatter = float(stats.median_abs_deviation(ratios, scale="normal"))
    return threshold + 1.2816 * scatter * math.sqrt(math.pi / 3 / pairs)


def bias(ratios: Sequence[float]) -> float:
    """How far head may seem to differ from both bases over the whole run where it is the same, from copy / base.

    What scatters from pair to pair is not in it: the bound of the test allows for that already.
    """
    return BIAS_FACTOR * abs(location(ratios))


def lower_bound(ratios: Sequence[float], level: float) -> float:
    """The exact one-sided lower confidence bound of the location: the signed-rank test turned round.

    The rank sum of a margin counts the Walsh averages above it (Tukey 1949), so the bound is the one that leaves just
    enough of them above to refuse what is below it at `level`; -inf where the pairs are too few.
    """
    walsh = np.sort(_walsh_averages(ratios))
    needed = _least_rank_sum(len(ratios), level)
    return float(walsh[-needed]) if needed <= len(walsh) else -math.inf


@lru_cache(maxsize=1024)
def _least_rank_sum(count: int, level: float) -> int:
    """The least sum of positive ranks of `count` values that is refused at `level`; one more than any where none is."""

    def p(total: int) -> float:
        signed = []
        for rank in range(count, 0, -1):
            positive = rank <= total
            total -= rank * positive
            signed.append(rank if positive else -rank)
        return float(stats.wilcoxon(signed, alternative="greater", method="exact").pvalue)

    return bisect.bisect_left(range(count * (count + 1) // 2 + 1), True, key=lambda total: p(total) <= level)


def p_above(ratios: Sequence[float] | np.ndarray, margin: float) -> float:
    """P of so large values where the location is at most `margin` (Wilcoxon's signed-rank test, exact)."""
    shifted = np.asarray(ratios) - margin
    if not np.isfinite(shifted).all():
        raise ValueError("a ratio is not a number: the times it comes from cannot be trusted")
    if not shifted.any():
        return 1.0
    return float(stats.wilcoxon(shifted, alternative="greater", method=_method(shifted)).pvalue)


def _method(values: np.ndarray) -> str:
    ties = len(np.unique(np.abs(values))) < len(values) or bool((values == 0).any())
    return "approx" if ties else "exact"


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses to refuse at a family-wise level (Holm 1979): the i-th smallest p has alpha / (m - i + 1)."""
    refused = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        refused[index] = True
    return refused
