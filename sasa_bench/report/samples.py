"""The samples of rows in the order in which they were taken, and what their scatter looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sasa_bench.case import AXES
from sasa_bench.report.table import varying_axes
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.record import Record

MOST_ROWS = 2000
"""Rows with samples on a page; more would make it heavy. They are spread evenly over the table."""
MOST_SAMPLES = 120
"""Samples of a row on a page, spread evenly over the run."""
FEWEST = 6
"""With fewer samples, nothing is said of their scatter."""
EVEN = 0.02
"""p20 to p80 over the median: below it a row counts as even."""
TREND = 0.75
"""Correlation of rank and time from which a row counts as drifting."""
DISTURBED = 1.25
"""A sample so many times the median is called disturbed."""


def packed(records: Sequence[Record], table: pd.DataFrame) -> list[dict[str, Any]]:
    """suite, impl, case in words, median in seconds, samples in ten-thousandths of it, scatter in words, by row.

    `table` is the tidy table of `records`, in their order.
    """
    axes = {suite: varying_axes(rows) for suite, rows in table.groupby("suite", sort=False)}
    timed = np.flatnonzero([record.status == "ok" and len(record.samples_s) > 1 for record in records])
    kept = (
        timed[np.unique(np.linspace(0, len(timed) - 1, min(MOST_ROWS, len(timed))).astype(int))] if len(timed) else []
    )
    words = {axis: table[axis].astype(str).to_list() for axis in AXES}
    names = table["impl"].to_list()
    found = []
    for i in kept:
        record = records[i]
        samples = np.asarray(record.samples_s)
        median = float(np.median(samples))
        thinned = _spread(samples, MOST_SAMPLES)
        found.append(
            {
                "suite": record.suite,
                "impl": names[i],
                "case": ", ".join(f"{COLUMNS[a].label} {words[a][i]}" for a in axes[record.suite]) or "the only case",
                "s": float(f"{median:.5g}"),
                "of": np.round(thinned / median * 1e4).astype(int).tolist(),
                "said": scatter(samples, int(record.extra.get("throttled_samples", 0) or 0)),
            }
        )
    return found


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """`most` of the values at most, spread evenly, in order."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int))]


def scatter(samples: np.ndarray, throttled: int = 0) -> str:
    """A sentence on the scatter of samples in the order in which they were taken, and its likely cause."""
    count = len(samples)
    if count < FEWEST:
        return f"{count} samples: too few to say how they scatter."
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    spread = (high - low) / median
    said = f"{count} samples, p20 to p80 spans {100 * spread:.2g} % of the median"
    return f"{said}{_pattern(samples, throttled, spread)}."


def _pattern(samples: np.ndarray, throttled: int, spread: float) -> str:
    count, median = len(samples), np.median(samples)
    if throttled:
        return f"; {throttled} more were dropped because the GPU was throttled"
    order = np.argsort(np.argsort(samples, kind="stable"), kind="stable")
    if spread > EVEN and abs(np.corrcoef(order, np.arange(count))[0, 1]) > TREND:
        fifth = max(1, count // 5)
        change = np.median(samples[-fifth:]) / np.median(samples[:fifth])
        word = "slower" if change > 1 else "faster"
        return f"; calls become {word}, {change:.2f} times from start to end: the clock or the temperature drifts"
    if spread > EVEN and (found := levels(samples)):
        return f"; they lie on two levels, one {found:.2f} times the other: the clock or the core changes"
    disturbed = samples[samples > DISTURBED * median]
    if len(disturbed):
        take = "sample takes" if len(disturbed) == 1 else "samples take"
        most = disturbed.max() / median
        return f"; {len(disturbed)} {take} up to {most:.2g} times the median: other work on the machine"
    return "; they scatter evenly" if spread <= EVEN else ", without a pattern in time"


def levels(samples: np.ndarray) -> float | None:
    """Upper over lower level where the samples fall in two groups, each a fifth of them or more; else None."""
    ordered = np.sort(samples)
    least = max(2, len(ordered) // 5)
    steps = np.diff(ordered)[least - 1 : len(ordered) - least]
    at = int(steps.argmax()) + least
    lower, upper = ordered[:at], ordered[at:]
    within = max(lower[-1] - lower[0], upper[-1] - upper[0])
    return float(np.median(upper) / np.median(lower)) if steps.max() > within else None
