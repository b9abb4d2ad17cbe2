"""The timing logic, tested with a clock that stands still between calls."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from sasa_bench.timing.sampling import Samples, calibrate, interleave, measure
from sasa_bench.timing.settings import Settings


class FakeTimer:
    """Each step is a number: the seconds that one call takes, times the noise of this sample."""

    def __init__(self, noise: Callable[[], float] = lambda: 1.0) -> None:
        self.noise, self.calls = noise, []

    def __call__(self, step: Callable[[], object], count: int) -> float:
        seconds = float(step())  # type: ignore[arg-type]
        self.calls.append((seconds, count))
        return seconds * count * self.noise()


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 0.003, 0.02, 2.0])
def test_calibration_fills_a_sample_and_warms_up(seconds: float) -> None:
    timer, settings = FakeTimer(), Settings(warmup_s=0.05, sample_s=0.01)
    count = calibrate(timer, lambda: seconds, settings)
    assert count == max(1, round(0.01 / seconds))
    assert sum(s * n for s, n in timer.calls) >= 0.05


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="clock"):
        calibrate(lambda step, count: 0.0, lambda: None, Settings())


def test_a_quiet_step_stops_at_the_least_number_of_samples() -> None:
    settings = Settings(least=7, most=50)
    found = interleave(FakeTimer(), {"a": lambda: 0.02, "b": lambda: 0.01}, settings)
    assert [len(s.seconds) for s in found.values()] == [7, 7]
    assert found["a"].seconds == [0.02] * 7


def test_a_noisy_step_goes_on_until_its_budget_is_spent() -> None:
    noise = random.Random(1)
    timer = FakeTimer(lambda: noise.uniform(0.5, 1.5))
    found = interleave(timer, {"a": lambda: 0.01}, Settings(budget_s=0.3, most=1000))["a"]
    assert 0.3 <= found.spent_s < 0.33


def test_a_call_that_outlasts_the_budget_gets_three_samples() -> None:
    found = interleave(FakeTimer(), {"a": lambda: 30.0}, Settings(budget_s=0.5))["a"]
    assert len(found.seconds) == 3


def test_rounds_interleave_the_steps_in_varying_order() -> None:
    timer = FakeTimer()
    interleave(timer, {"a": lambda: 0.02, "b": lambda: 0.01, "c": lambda: 0.04}, Settings(least=20, budget_s=1.0))
    sampled = [seconds for seconds, count in timer.calls][-60:]
    rounds = [tuple(sampled[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == [0.01, 0.02, 0.04] for r in rounds)
    assert len(set(rounds)) > 2


def test_long_calls_miss_rounds_and_are_there_at_both_ends() -> None:
    timer = FakeTimer()
    steps = {"short": lambda: 0.01, "middle": lambda: 0.05, "long": lambda: 3.0}
    found = interleave(timer, steps, Settings(budget_s=0.2, least=7, precision=-1.0, fewest=2))
    assert {name: len(sample.seconds) for name, sample in found.items()} == {"short": 8, "middle": 5, "long": 2}
    sampled = [seconds for seconds, count in timer.calls]
    assert 3.0 in sampled[-3:]
    assert sampled.count(3.0) == 3  # one call calibrates


def test_thrown_away_samples_have_time_to_be_taken_again() -> None:
    kept = iter([False, True] * 20)
    found = interleave(FakeTimer(), {"a": lambda: 0.1}, Settings(budget_s=0.5, least=5), keep=lambda: next(kept))["a"]
    assert len(found.seconds) == 5
    assert found.discarded == 5


def test_before_each_sample_the_step_is_announced() -> None:
    said: list[str] = []
    interleave(FakeTimer(), {"a": lambda: 0.02, "b": lambda: 0.01}, Settings(least=3, most=3), said.append)
    assert said[:2] == ["a", "b"]
    assert sorted(said[2:]) == ["a"] * 3 + ["b"] * 3


def test_samples_are_means_over_the_inner_count() -> None:
    found = interleave(FakeTimer(), {"a": lambda: 0.001}, Settings(sample_s=0.01))["a"]
    assert found.inner_count == 10
    assert found.seconds[0] == pytest.approx(0.001)


def test_too_few_samples_are_never_enough() -> None:
    assert not Samples(1, [1.0] * 5, spent_s=0.0).enough(Settings(least=3))


def test_measure_times_a_function_of_ones_own() -> None:
    found = measure(torch.mm, torch.ones(64, 64), torch.ones(64, 64), settings=Settings(budget_s=0.02, warmup_s=0.01))
    assert 0 < found.median_s < 0.1
    assert len(found.samples_s) >= 3
