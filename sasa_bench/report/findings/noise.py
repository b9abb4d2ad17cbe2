"""One sentence on how quiet the machine was while it measured, and what disturbed it most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from sasa_bench.report.samples import levels
from sasa_bench.results.record import Record, Results

THROTTLED = 0.01
"""Share of a run for which a quota may stop the container."""

STOLEN, OTHERS = 0.01, 0.05
"""Shares of the processors that the hypervisor and other processes may take, in the median row."""

DRIFT = 1.05
"""The last worker's times over the first one's, in the median row."""

TWO_LEVELS = 0.2
"""Share of the rows whose samples may lie on two levels."""

SPOILED = 0.05
"""Share of the samples that may be spoiled without a cause that is seen."""


def noise(results: Results) -> str:
    """The sentence; "" where no row has a time. What disturbed most directly is named first."""
    rows = [row for row in results.rows if row.samples_s and row.case.device == "cpu"]
    if not rows:
        return ""
    cause = next(_causes(results, rows), "unknown, the system reports no disturbance")
    samples = sum(len(row.samples_s) for row in rows)
    spoiled = sum(int(row.extra.get("spoiled_samples", 0)) for row in rows)
    counted = (
        f"; the host disturbed {spoiled} of {samples} samples"
        if any("spoiled_samples" in r.extra for r in rows)
        else ""
    )
    return f"Likely cause of noise: {cause}{counted}."


def _causes(results: Results, rows: Sequence[Record]) -> Iterator[str]:
    stopped = sum(found.throttled_s or 0.0 for found in results.conditions if found.moment == "after")
    timed = sum(sum(row.samples_s) * row.inner_count for row in rows)
    if stopped > THROTTLED * timed:
        yield f"a quota: the container was stopped for {stopped:.3g} s because it had used up its processor time"
    stolen = statistics.median(row.extra.get("stolen", 0.0) for row in rows)
    if stolen > STOLEN:
        yield f"a neighbour on the host: the hypervisor gave {stolen:.1%} of the processors' time to others"
    others = statistics.median(row.extra.get("disturbed", 0.0) - row.extra.get("stolen", 0.0) for row in rows)
    if others > OTHERS:
        yield f"a neighbour on this system: other processes took {others:.1%} of the processors' time"
    changes = [math.log(_change(row)) for row in rows if len(row.worker_samples) > 1]
    if changes and abs(middle := statistics.median(changes)) > math.log(DRIFT):
        word = "slower" if middle > 0 else "faster"
        yield f"drift: times of the last worker are {math.exp(abs(middle)):.2f} times {word} than those of the first"
    found = [level for row in rows if len(row.samples_s) >= 10 and (level := levels(np.array(row.samples_s)))]
    if len(found) > TWO_LEVELS * len(rows):
        yield (
            f"two modes: samples of {len(found)} of {len(rows)} rows lie on two levels, usually one "
            f"{statistics.median(found):.2f} times the other: the clock or the core changes"
        )
    clock = statistics.median(row.extra.get("clock", 1.0) for row in rows)
    if 0 < clock < 1 / DRIFT:
        yield f"the clock: fixed work took {1 / clock:.2f} times its minimum in the median row"


def _change(row: Record) -> float:
    workers = row.by_worker
    return statistics.median(workers[-1]) / statistics.median(workers[0])
