"""Change points of series, and how sure they are.

Change points are those of a rank cost (ruptures), each judged by the drawn null distribution of the largest
Kruskal-Wallis statistic over all splits, so that having searched for the best split is paid for. The false discovery
rate over all series is held at the stated level (Benjamini and Hochberg 1995).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy import stats

from sasa_bench.report.history.series import HistoryError

LEVEL = 0.01
DRAWS = 60_000
"""Random orders behind a null distribution."""
FEW = 10
"""Where fewer of them exceed the statistic, its p-value is at most the number of splits times that of a single one, by
the chi-squared distribution, whose far tail is heavier: among many series a change needs less than one draw in all."""
SURER = 10.0
"""Where one change is significant, two are told only if their p-value is so many times smaller."""
NEIGHBOURS = 0.05
"""Of two changes found together, each must show by itself at this level (Mann-Whitney)."""


def change_points(series: Sequence[Sequence[float]], level: float = LEVEL) -> list[dict[int, float]]:
    """For each series, index of the first value after a change -> its p-value, adjusted over all series.

    Every series is split at its best place or two; what holds after Benjamini and Hochberg makes parts, which are
    split in the next round. Where nothing changed in any series, a change is found with probability `level` at most,
    however the values scatter, as long as their order is random. Raises HistoryError without ruptures.
    """
    found: list[dict[int, float]] = [{} for _ in series]
    least = least_results(level)
    parts = [(i, 0, len(values)) for i, values in enumerate(series)]
    while parts := [part for part in parts if part[2] - part[1] >= least]:
        splits = [best_split(series[i][first:last], level) for i, first, last in parts]
        adjusted = stats.false_discovery_control([p for _, p in splits])
        following = []
        for (i, first, last), (places, _), p in zip(parts, splits, adjusted, strict=True):
            if p <= level:
                found[i] |= {first + place: float(p) for place in places}
                following += [(i, a, b) for a, b in pairwise([first, *(first + place for place in places), last])]
        parts = following
    return found


def best_split(values: Sequence[float], level: float = LEVEL) -> tuple[list[int], float]:
    """(indices of the first values after the most likely changes, one or two; p-value of there being any).

    A lasting change splits the values in two, one that was mended in three. Either p-value is that of the largest
    Kruskal-Wallis statistic over all such splits under random order, and counts twice (Bonferroni). Two changes are
    told where one is not significant or they are so much SURER, for the best single split of a change that was mended
    may lie far from it; of the two, those beside which the parts differ by themselves.
    """
    try:
        import ruptures
    except ModuleNotFoundError:
        raise HistoryError("change points need ruptures: pip install 'sasa-bench[history]'") from None
    search = ruptures.Dynp(model="rank", min_size=1, jump=1).fit(np.asarray(values))
    ranks, found = stats.rankdata(values), []
    for cuts in (1, 2):
        places = [int(place) for place in search.predict(n_bkps=cuts)[:-1]]
        statistic = stats.kruskal(*np.split(ranks, places)).statistic if np.ptp(ranks) else 0.0
        null = _null(len(values), cuts)
        exceeding = len(null) - np.searchsorted(null, statistic - 1e-9)
        p = float((exceeding + 1) / (len(null) + 1))
        if exceeding < FEW:
            p = min(p, math.comb(len(values) - 1, cuts) * float(stats.chi2.sf(statistic, cuts)))
        found.append((min(1.0, 2 * p), places))
    if found[0][0] <= max(found[1][0], min(level, SURER * found[1][0])):
        return _sharpened(values, found[0][1]), found[0][0]
    p, places = found[1]
    parts = np.split(ranks, places)
    real = [i for i, (a, b) in enumerate(pairwise(parts)) if stats.mannwhitneyu(a, b).pvalue <= NEIGHBOURS]
    places, p = ([places[i] for i in real], p) if real else (found[0][1], found[0][0])
    return _sharpened(values, places), p


def _sharpened(values: Sequence[float], places: Sequence[int]) -> list[int]:
    """The places, each moved between its neighbours to where values lie closest to the medians of both sides.

    Ranks show that there is a change and forget how large it is: the highest values before it look like those after it.
    """
    moved = list(places)
    for i in range(len(moved)):
        start, end = ([0, *moved][i], [*moved, len(values)][i + 1])
        moved[i] = min(range(start + 1, end), key=lambda at: _spread(values[start:at]) + _spread(values[at:end]))
    return moved


def _spread(values: Sequence[float]) -> float:
    """The sum of distances from the median."""
    middle = statistics.median(values)
    return sum(abs(value - middle) for value in values)


def least_results(level: float = LEVEL) -> int:
    """The fewest results in which a lasting change can be found.

    Of all ways to choose the later half, two are as extreme; best_split doubles that, for it looks for two kinds.
    """
    count = 2
    while 4 / math.comb(count, count // 2) > level:
        count += 2
    return count


@lru_cache(maxsize=512)
def _null(count: int, cuts: int) -> np.ndarray:
    """The largest statistic over all splits of `count` values in random order, sorted; the same in every process."""
    rng = np.random.default_rng([count, cuts])
    ranks = np.tile(np.arange(1.0, count + 1), (DRAWS // 20, 1))
    drawn = [_largest(rng.permuted(ranks, axis=1), cuts) for _ in range(20)]
    return np.sort(np.concatenate(drawn))


def _largest(ranks: np.ndarray, cuts: int) -> np.ndarray:
    """The largest Kruskal-Wallis statistic over all splits in `cuts` + 1 parts; ranks [N, n] -> [N]."""
    n = ranks.shape[1]
    sums = np.cumsum(ranks, axis=1).T  # [n, N]
    place = np.arange(1.0, n + 1)[:, None]
    if cuts == 1:
        squares = (sums[:-1] ** 2 / place[:-1] + (sums[-1] - sums[:-1]) ** 2 / (n - place[:-1])).max(axis=0)
    else:
        squares = np.zeros(len(ranks))
        last = (sums[-1] - sums[:-1]) ** 2 / (n - place[:-1])
        for i in range(n - 2):
            middle = (sums[i + 1 : -1] - sums[i]) ** 2 / (place[i + 1 : -1] - place[i])
            squares = np.maximum(squares, sums[i] ** 2 / (i + 1) + (middle + last[i + 1 :]).max(axis=0))
    return 12 / (n * (n + 1)) * squares - 3 * (n + 1)


def levels(values: Sequence[float], places: Mapping[int, float]) -> list[tuple[int, float, float, float]]:
    """(index, median before, median after, p-value) of each change; each level reaches to the next change."""
    cuts = [0, *sorted(places), len(values)]
    medians = [statistics.median(values[a:b]) for a, b in pairwise(cuts)]
    return [(cut, medians[i], medians[i + 1], places[cut]) for i, cut in enumerate(cuts[1:-1])]
