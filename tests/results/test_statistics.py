from __future__ import annotations

import numpy as np

from sasa_bench.results.statistics import half_width, interval_of_median


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    noise = np.random.default_rng()
    for count in (6, 15, 40):
        hits = 0
        for _ in range(2000):
            low, high = interval_of_median(noise.lognormal(size=count))
            hits += low <= 1.0 <= high
        assert hits / 2000 > 0.93


def test_the_interval_of_few_samples_is_infinite() -> None:
    assert interval_of_median([1.0] * 5) == (-np.inf, np.inf)
    assert half_width([1.0] * 5) == np.inf
    assert half_width([1.0] * 6) == 0
