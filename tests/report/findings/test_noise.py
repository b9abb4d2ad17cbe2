"""The sentence names the cause that disturbed a made-up run."""

from __future__ import annotations

from typing import Any

import factory
import pytest

from sasa_bench.case import Case
from sasa_bench.report.findings.noise import noise
from sasa_bench.results.record import Conditions, Record, Results

QUIET = {"disturbed": 0.01, "stolen": 0.0, "clock": 0.99, "spoiled_samples": 0}


def row(workers: tuple[float, ...] = (0.01, 0.01, 0.01), samples: int = 7, **extra: Any) -> Record:
    seconds = [s * (1 + 0.001 * (i % 5)) for s in workers for i in range(samples)]
    more = {"worker_samples": (samples,) * len(workers), "extra": QUIET | extra}
    return factory.record(samples_s=tuple(seconds), **more)


def said(*rows: Record, **after: Any) -> str:
    moments = [Conditions(machine="m", moment="after", at="now", **after)]
    return noise(Results(list(rows), conditions=moments))


@pytest.mark.parametrize(
    ("rows", "after", "cause"),
    [
        ([row()], {}, "unknown, the system reports no disturbance; the host disturbed 0 of 21 samples."),
        ([row(), row(spoiled_samples=3)], {}, "; the host disturbed 3 of 42 samples."),
        ([row()], {"throttled_s": 5.0}, "a quota: the container was stopped for 5 s"),
        ([row(disturbed=0.06, stolen=0.05)], {}, "a neighbour on the host: the hypervisor gave 5.0%"),
        ([row(disturbed=0.5)], {}, "a neighbour on this system: other processes took 50.0%"),
        ([row((0.01, 0.0105, 0.011))], {}, "drift: times of the last worker are 1.10 times slower"),
        ([row((0.011, 0.0105, 0.01))], {}, "drift: times of the last worker are 1.10 times faster"),
        ([row((0.01, 0.02, 0.01))], {}, "two modes: samples of 1 of 1 rows lie on two levels, usually one 2.00 times"),
        ([row(clock=0.8)], {}, "the clock: fixed work took 1.25 times"),
    ],
)
def test_the_likely_cause_is_one_sentence(rows: list[Record], after: dict[str, Any], cause: str) -> None:
    sentence = said(*rows, **after)
    assert sentence.startswith("Likely cause of noise: ")
    assert cause in sentence


def test_one_disturbed_row_of_many_is_no_cause() -> None:
    assert "unknown, the system reports no disturbance" in said(
        *[row()] * 9, row(disturbed=0.9), row((0.01, 0.02, 0.01))
    )


def test_rows_from_before_there_were_such_figures_say_nothing_of_samples() -> None:
    sentence = noise(Results([factory.record()]))
    assert sentence == "Likely cause of noise: unknown, the system reports no disturbance."
    assert noise(Results([factory.failed("unfold", "error", "boom", case=Case())])) == ""
