"""The file that pytest-benchmark writes of suites (see pytest_plugin), as the lines of a results file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sasa_bench.results.machine import Machine

MARK = "sasa_bench"
"""The key of `extra_info` that tells a case of a suite from any other benchmark; it holds what a reader needs of the
implementation and the machine. The other keys are those of a row."""

NOT_HERE = ("kind", "status", "reason", "samples_s", "inner_count", "machine")


def extra_info(row: dict[str, Any], impl: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """What goes into `extra_info` of one benchmark: the row but its times, the lines `impl` and `machine`."""
    kept = {name: value for name, value in row.items() if name not in NOT_HERE}
    return kept | {"machine": machine.hardware_id, MARK: {"impl": impl, "machine": machine.to_dict()}}


def parse(text: str) -> dict[str, Any] | None:
    """The document in `text` if pytest-benchmark wrote it, else None."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(document, dict) and isinstance(document.get("benchmarks"), list) and "machine_info" in document
    return document if known else None


def lines(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines `machine`, `impl` and `row` of the benchmarks that are cases of suites.

    Raises KeyError for a benchmark that was saved without its samples.
    """
    for benchmark in document["benchmarks"]:
        extra = benchmark.get("extra_info", {})
        if MARK not in extra:
            continue
        row = dict(extra)
        about = row.pop(MARK)
        machine = Machine.from_dict(about["machine"])
        yield {"kind": "machine", "id": machine.id} | machine.to_dict()
        yield {"kind": "impl"} | about["impl"]
        stats = benchmark["stats"]
        yield (
            {"kind": "row", "status": "ok", "reason": "", "inner_count": stats["iterations"]}
            | row
            | {
                "samples_s": stats["data"],
                "machine": machine.id,
            }
        )
