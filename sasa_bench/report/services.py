"""The table as services that follow benchmarks over time read it. Rows without a time have nothing to export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from sasa_bench.case import AXES, from_dict
from sasa_bench.results.file import ResultsError


def github_action_benchmark(table: pd.DataFrame) -> str:
    """JSON for the tool `customSmallerIsBetter` of github-action-benchmark: a list of name, unit, value, range, extra.

    The value is the median in milliseconds, the range p20 to p80. Raises ResultsError as `named` does.
    """
    entries = []
    for name, row in named(table):
        extra = [f"machine: {row['machine']}", f"samples: {row['sample_count']}", f"commit: {row['commit']}"]
        if not pd.isna(row["flops"]):
            extra.append(f"FLOPs: {row['flops']}")
        if not pd.isna(row["peak_memory_bytes"]):
            extra.append(f"peak memory: {row['peak_memory_bytes']} bytes")
        entries.append(
            {
                "name": name,
                "unit": "ms",
                "value": row["time_median_s"] * 1e3,
                "range": f"{row['time_p20_s'] * 1e3:.6g} – {row['time_p80_s'] * 1e3:.6g}",
                "extra": "\n".join(extra),
            }
        )
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def bencher(table: pd.DataFrame) -> str:
    """Bencher Metric Format: name -> latency -> value, lower_value, upper_value.

    The built-in measure `latency` is in nanoseconds; the value is the median, its bounds are p20 and p80. Raises
    ResultsError as `named` does.
    """
    columns = {"value": "time_median_s", "lower_value": "time_p20_s", "upper_value": "time_p80_s"}
    document = {
        name: {"latency": {key: row[column] * 1e9 for key, column in columns.items()}} for name, row in named(table)
    }
    return json.dumps(document, indent=1) + "\n"


EXPORTS: dict[str, Callable[[pd.DataFrame], str]] = {
    "github-action-benchmark": github_action_benchmark,
    "bencher": bencher,
}
"""Format of `sasa-bench table` -> the function that writes it."""


def named(table: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row) of every row with a time; the name says suite, implementation and the axes that are not default.

    Names do not depend on what else is in the table, so that a row keeps its name from run to run. Raises ResultsError
    where no row has a time, and where two have the same name.
    """
    seen = set()
    for _, row in table[table["time_median_s"].notna()].iterrows():
        case = from_dict({axis: row[axis] for axis in AXES})
        name = f"{row['suite']}/{row['impl']}: {case.describe()}"
        if name in seen:
            raise ResultsError(
                f"two rows are called {name!r}: export the results of one machine and revision at a time"
            )
        seen.add(name)
        yield name, {str(key): value for key, value in row.items()}
    if not seen:
        raise ResultsError("no row has a time, so there is nothing to export")
