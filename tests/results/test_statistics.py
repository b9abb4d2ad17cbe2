from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from sasa_bench.results.statistics import half_width, interval_of_median, is_noisy, ratio_of_times, scatter


def often(missed: int, count: int, level: float = 0.05) -> bool:
    """Whether intervals of a stated `level` missed what they hold more often than one chance in a million allows."""
    return binomtest(missed, count, level, alternative="greater").pvalue < 1e-6


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    noise = np.random.default_rng()
    for count in (6, 15, 40):
        missed = 0
        for _ in range(2000):
            low, high = interval_of_median(noise.lognormal(size=count))
            missed += not low <= 1.0 <= high
        assert not often(missed, 2000)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975])
def test_the_rank_is_that_of_the_binomial_distribution(confidence: float) -> None:
    for count in (*range(60), 101, 2000):
        fewer = binom.cdf(np.arange(count + 1), count, 0.5)  # than 1, 2, ... samples below the median
        rank = int(np.sum(2 * fewer <= 1 - confidence))
        low, high = interval_of_median([float(i) for i in range(1, count + 1)], confidence)
        assert (low, high) == ((rank, count + 1 - rank) if rank else (-np.inf, np.inf))


def test_the_interval_of_few_samples_is_infinite() -> None:
    assert interval_of_median([1.0] * 5) == (-np.inf, np.inf)
    assert half_width([1.0] * 5) == np.inf
    assert half_width([1.0] * 6) == 0


def test_the_interval_of_a_ratio_covers_it_although_every_worker_has_a_bias_of_its_own() -> None:
    noise, missed = np.random.default_rng(), 0
    for _ in range(2000):
        bias = noise.lognormal(sigma=0.03, size=(2, 3, 1))
        over, under = (2.0 * bias[0], bias[1]) * noise.lognormal(sigma=0.02, size=(2, 3, 9))
        _, low, high = ratio_of_times(over.tolist(), under.tolist())
        missed += not low <= 2.0 <= high
    assert not often(missed, 2000)


def test_the_interval_of_a_ratio_in_one_process_needs_samples() -> None:
    assert ratio_of_times([[1.0] * 3], [[1.0] * 3]) == (1.0, 0.0, np.inf)
    assert ratio_of_times([[2.0] * 9], [[1.0] * 9]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_interval_of_a_ratio_is_unbounded_where_samples_lie_on_two_levels(workers: int) -> None:
    """A neighbour on the machine: p20 to p80 is 0.8 to 8 ms, and the median falls on either by chance."""
    noise = np.random.default_rng()
    level = np.where(np.arange(21) % 20 < 11, 0.8e-3, 8e-3)
    uneven = (level * noise.uniform(0.99, 1.01, (workers, 21))).tolist()
    even = noise.uniform(0.2e-3, 0.21e-3, (workers, 21)).tolist()
    assert ratio_of_times(uneven, even)[1:] == ratio_of_times(even, uneven)[1:] == (0.0, np.inf)
    assert ratio_of_times(even, even)[2] < 1.1


def test_a_ratio_beside_a_neighbour_has_an_interval_over_workers_where_its_medians_are_clear() -> None:
    noise, missed, known = np.random.default_rng(), 0, 0
    for _ in range(2000):
        disturbed = noise.permuted(np.arange(21) % 3 * np.ones((3, 1)) == 0, axis=1)
        host = np.where(disturbed, noise.uniform(2, 4, (3, 21)), 1.0)
        over, under = (level * host * noise.lognormal(sigma=0.05, size=(3, 21)) for level in (2.0, 1.0))
        assert is_noisy(over.ravel().tolist())
        _, low, high = ratio_of_times(over.tolist(), under.tolist())
        missed += not low <= 2.0 <= high
        known += np.isfinite(high)
    assert not often(missed, 2000)
    assert known > 1800


def test_a_ratio_lies_in_its_interval_although_the_host_changes_its_speed_between_workers() -> None:
    """The slow worker has most of the samples of one and few of the other: their medians lie on two levels."""
    over, under = [[1.0] * 4, [1.0] * 4, [1.9] * 9], [[2.0] * 9, [2.0] * 9, [3.8] * 3]
    medians = np.median(np.concatenate(over)) / np.median(np.concatenate(under))
    value, low, high = ratio_of_times(over, under)
    assert value == pytest.approx(0.5)
    assert low <= value <= high
    assert not low <= medians <= high


def test_two_modes_scatter_and_one_does_not() -> None:
    assert scatter([0.8e-3] * 10 + [8e-3] * 10) == pytest.approx(10.0)
    assert scatter([1.0, 1.01, 0.99, 1.0, 1.02]) < 1.05
    assert scatter([1.0, 9.0]) == 1.0
