from __future__ import annotations

from pathlib import Path

import factory
import numpy as np
import pytest

from sasa_bench.report.samples import MOST_ROWS, packed, scatter
from sasa_bench.report.table import frame
from sasa_bench.results.file import read

RNG = np.random.default_rng(int.from_bytes(np.random.bytes(4), "little"))


def noise(count: int = 60, width: float = 0.05) -> np.ndarray:
    return 1 + width * RNG.uniform(-1, 1, count)


@pytest.mark.parametrize(
    ("samples", "throttled", "words"),
    [
        (noise(4), 0, "too few"),
        (noise(width=0.005), 0, "scatter evenly"),
        (noise(), 0, "without a pattern"),
        (noise() + np.linspace(0, 0.5, 60), 0, "slower, 1.* the clock or the temperature drifts"),
        (noise() - np.linspace(0, 0.4, 60), 0, "faster, 0.* the clock or the temperature drifts"),
        (np.where(np.arange(60) % 3 == 0, 1.4, 1.0) * noise(width=0.001), 0, "two levels, one 1.4"),
        (np.where(np.arange(60) == 30, 3.0, noise(width=0.005)), 0, "1 sample takes up to 3 times the median"),
        (noise(), 7, "7 more were dropped because the GPU was throttled"),
    ],
)
def test_the_scatter_is_put_into_words(samples: np.ndarray, throttled: int, words: str) -> None:
    import re

    assert re.search(words, scatter(samples, throttled)), scatter(samples, throttled)


def test_samples_keep_their_order_and_their_values(tmp_path: Path) -> None:
    results = read([factory.results_file(tmp_path / "a.jsonl", factory.sweep())])
    rows = packed(results.rows, frame(results))
    assert len(rows) == len(results.rows)
    for row, record in zip(rows, results.rows, strict=True):
        assert np.asarray(row["of"]) * 1e-4 * row["s"] == pytest.approx(record.samples_s, rel=2e-4)
        assert row["case"] == f"kernel size {record.case.kernel_size}"


def test_a_large_report_holds_the_samples_of_some_rows_of_every_part(tmp_path: Path) -> None:
    rows = [factory.record("unfold", case=factory.Case(batch=n + 1, threads=2)) for n in range(MOST_ROWS + 500)]
    results = read([factory.results_file(tmp_path / "a.jsonl", rows)])
    found = packed(results.rows, frame(results))
    assert len(found) == MOST_ROWS
    assert (found[0]["case"], found[-1]["case"]) == ("batch 1", f"batch {len(rows)}")


def test_what_has_no_time_has_no_samples(tmp_path: Path) -> None:
    results = read([factory.results_file(tmp_path / "a.jsonl", [factory.failed("naive", "error", "boom")])])
    assert packed(results.rows, frame(results)) == []
