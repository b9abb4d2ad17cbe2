"""Intervals of a median, from order statistics, and of a ratio of two, over worker processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache


def interval_of_median(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that holds the median with at least this confidence.

    Infinite where the samples are too few. The number of samples below the median is binomial(n, 1/2).
    """
    k = _rank(len(samples), confidence)
    if not k:
        return -math.inf, math.inf
    ordered = sorted(samples)
    return ordered[k - 1], ordered[-k]


def half_width(samples: Sequence[float]) -> float:
    """Half of the 95 % interval of the median, as a share of the median."""
    low, high = interval_of_median(samples)
    return (high - low) / 2 / statistics.median(samples)


FEWEST = 5
"""With fewer samples, nothing is said of their scatter."""
NOISY = 2.0
"""A median says little where a fifth of the samples take that many times as long as another fifth, and a ratio nothing
where the interval of a median spans as much."""

LEAST_WORKERS = 3
"""An interval over worker processes needs as many; from two, Student's t is 13 times the standard error."""


def ratio_of_times(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, float, float]:
    """A ratio of two times with the ends of its interval, each a list of samples for each process that measured both.

    The error is between processes and minutes more than between the samples of one: with LEAST_WORKERS or more, the
    ratio is the geometric mean of the workers' median(over) / median(under), the two of a worker paired, as they were
    interleaved, and the interval is Student's t over their logarithms.
    With fewer it is the ratio of the medians, and holds for that process and minute only: its interval comes from the
    order statistics of both, each at half the error.

    The interval is 0 to infinity where the median of either `may_lie_anywhere`.
    """
    everything = [s for group in over for s in group], [s for group in under for s in group]
    anywhere = any(may_lie_anywhere(samples) for samples in everything)
    if not anywhere and len(over) == len(under) >= LEAST_WORKERS:
        from scipy.stats import t

        logs = [math.log(statistics.median(a) / statistics.median(b)) for a, b in zip(over, under, strict=True)]
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        half = float(t.ppf((1 + confidence) / 2, len(logs) - 1)) * error
        middle = statistics.mean(logs)
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)
    of_medians = statistics.median(everything[0]) / statistics.median(everything[1])
    if anywhere:
        return of_medians, 0.0, math.inf
    each = 1 - (1 - confidence) / 2
    (low_over, high_over), (low_under, high_under) = (interval_of_median(samples, each) for samples in everything)
    high = high_over / low_under if low_under > 0 else math.inf
    return of_medians, max(0.0, low_over / high_under), high


def may_lie_anywhere(samples: Sequence[float]) -> bool:
    """Whether the 95 % interval of the median spans more than NOISY times: samples lie on levels, and it is on either.

    Scatter alone is no reason to say nothing of a ratio: the interval over workers covers it.
    """
    low, high = interval_of_median(samples)
    return math.isfinite(high) and high > NOISY * low


def scatter(samples: Sequence[float]) -> float:
    """p80 over p20 of times that are above 0; 1 where there are too few to tell."""
    if len(samples) < FEWEST:
        return 1.0
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return high / low


def is_noisy(samples: Sequence[float]) -> bool:
    """Whether times scatter too much for their median to be ranked: p80 above NOISY x p20."""
    return scatter(samples) > NOISY


@lru_cache(maxsize=1024)
def _rank(count: int, confidence: float) -> int:
    """The largest k for which 2 P(fewer than k samples below the median) <= 1 - confidence; 0 for none."""
    k, ways, fewer = 0, 1, 1  # C(count, k) and the sum of these up to it, in whole numbers: exact for any count
    everything = 2**count
    while 2 * fewer / everything <= 1 - confidence:
        ways = ways * (count - k) // (k + 1)
        k += 1
        fewer += ways
    return k
