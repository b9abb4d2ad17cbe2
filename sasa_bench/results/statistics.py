"""Distribution-free intervals of a median, from order statistics."""

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


@lru_cache(maxsize=1024)
def _rank(count: int, confidence: float) -> int:
    """The largest k for which 2 P(fewer than k samples below the median) <= 1 - confidence; 0 for none."""
    from scipy.stats import binom  # half a second, which every process of a gate would pay

    k = 0
    while 2 * binom.cdf(k, count, 0.5) <= 1 - confidence:
        k += 1
    return k
