"""Times over those of the 3 x 3 convolution: the paper's baseline, and the fastest one that was measured beside it.

Rows are compared within one file, suite, case and machine id, which covers hardware, libraries and revision: nothing
else was measured interleaved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sasa_bench import ops
from sasa_bench.results.record import Record, Results
from sasa_bench.results.statistics import ratio_of_times

BASELINE = "conv3x3"
"""The implementation of the paper's baseline: torch's own convolution as most models call it."""

BEST_RATIO = "time_vs_best_conv3x3"


def ratios(results: Results) -> list[dict[str, Any]]:
    """For each row of `results` its columns that compare with a 3 x 3 convolution; none where there is nothing to.

    time_vs_conv3x3, _low, _high        time over that of BASELINE with its 95 % interval, statistics.ratio_of_times
    best_conv3x3                        the 3 x 3 convolution with the least median time, ONNX Runtime's included
    time_vs_best_conv3x3, _low, _high   the same over that one
    """
    groups: dict[Any, list[Record]] = defaultdict(list)
    keys = []
    for position, row in enumerate(results.rows):
        keys.append((*apart(results, position), row.suite, row.case))
        groups[keys[-1]].append(row)
    compared = {key: _convolutions(rows) for key, rows in groups.items()}
    return [_columns(row, *compared[key]) for row, key in zip(results.rows, keys, strict=True)]


def apart(results: Results, position: int) -> tuple[str, str]:
    """File and machine id of a row: rows that differ in them were not measured interleaved, and are not compared."""
    source = results.files[position] if position < len(results.files) else ""
    return source, results.rows[position].machine


def is_conv3x3(row: Record) -> bool:
    """Whether a row is a 3 x 3 convolution of its case by the work that it did; of a network, one of such.

    The name says nothing: a convolution with the window of the case is one where that window is 3 x 3.
    """
    if row.op != "convolution" or row.flops is None:
        return False
    return row.case.stem != "none" or row.flops == ops.get(row.op).cost(row.case.with_(kernel_size=3)).flops


def _convolutions(rows: Sequence[Record]) -> tuple[Record | None, Record | None]:
    """(BASELINE, the fastest 3 x 3 convolution) among the ok rows of one case; a later row replaces an earlier one."""
    found = {row.impl: row for row in rows if row.samples_s and is_conv3x3(row)}
    best = min(found.values(), key=lambda row: row.median_s, default=None)
    return found.get(BASELINE), best


def _columns(row: Record, baseline: Record | None, best: Record | None) -> dict[str, Any]:
    if not row.samples_s:
        return {}
    found: dict[str, Any] = {"best_conv3x3": best.impl} if best else {}
    for name, other in (("time_vs_conv3x3", baseline), (BEST_RATIO, best)):
        if other is not None:
            same = other is row
            value, low, high = (1.0, 1.0, 1.0) if same else ratio_of_times(row.by_worker, other.by_worker)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found
