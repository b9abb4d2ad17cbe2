"""Made-up machines, records and files for tests of readers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.results.file import Writer
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record, Roof

OPS = {"conv3x3": "convolution", "conv1x1": "convolution"}


def machine(**changes: Any) -> Machine:
    """A plausible machine."""
    values: dict[str, Any] = {
        "cpu": "Test CPU",
        "cores": 2,
        "isa": ("avx2", "fma"),
        "memory_bytes": 8 << 30,
        "gpu": "",
        "driver": "",
        "os": "Linux 6.1",
        "python": "3.11.7",
        "libraries": {"torch": "2.13.0"},
        "environment": {"GOMP_SPINCOUNT": "20000"},
        "commit": "0123456789ab",
        "dirty": False,
    }
    return Machine(**values | changes)


def record(
    impl: str = "unfold", median_s: float = 0.01, noise: float = 0.02, count: int = 21, **changes: Any
) -> Record:
    """An ok row whose samples scatter around `median_s`."""
    case = changes.pop("case", Case(threads=2))
    op = OPS.get(impl, "local_attention")
    computed = case.with_(kernel_size=3) if impl == "conv3x3" else case
    found = ops.get(op).cost(computed)
    random.seed(repr((impl, median_s, count)))
    values: dict[str, Any] = {
        "suite": "kernel_size",
        "impl": impl,
        "op": op,
        "case": case,
        "status": "ok",
        "samples_s": tuple(median_s * (1 + noise * random.uniform(-1, 1)) for _ in range(count)),
        "inner_count": 3,
        "flops": found.flops,
        "params": found.params,
        "min_bytes": found.min_bytes,
        "peak_memory_bytes": 1 << 20,
        "memory_source": "high-water mark of resident memory",
        "max_abs_err": 1e-7,
        "err_budget": 1e-6,
        "machine": machine().id,
        "started_at": "2026-11-22T10:00:00+00:00",
    }
    return Record(**values | changes)


def failed(impl: str, status: str, reason: str, **changes: Any) -> Record:
    """A row without a time."""
    changes = {"samples_s": (), "inner_count": 0, "peak_memory_bytes": None} | changes
    return record(impl, status=status, reason=reason, **changes)


EXPORTS: dict[str, dict[str, Any]] = {
    "unfold_file": {"exports": "unfold"},
    "blocked_file": {"exports": "blocked"},
    "blocked_any_size": {"exports": "blocked", "any_size": True},
    "kernel_file": {"exports": "kernel", "library": True},
}
"""What made-up implementations export, by name."""


def results_file(path: Path, rows: Iterable[Record], made_on: Machine | None = None) -> Path:
    """A results file as a run writes it."""
    rows = list(rows)
    made_on = made_on or machine()
    with Writer(path) as writer:
        writer.machine(made_on)
        names = dict.fromkeys((row.impl, row.op) for row in rows)
        writer.impls(
            ImplInfo(name, op, f"{name}, made up", i, **EXPORTS.get(name, {})) for i, (name, op) in enumerate(names)
        )
        writer.roof(Roof(made_on.id, "cpu", "float32", 2, 2e11, 3e10))
        writer.rows(rows)
    return path


def sweep(slow: float = 1.0) -> list[Record]:
    """unfold, blocked and conv3x3 over the window; blocked crosses conv3x3 between 5 and 7."""
    rows = []
    for k in (3, 5, 7, 9):
        case = Case(kernel_size=k, threads=2)
        rows.append(record("unfold", slow * 0.001 * k * k, case=case))
        rows.append(record("blocked", 0.0004 * k, case=case))
        rows.append(record("conv3x3", 0.0022, case=case))
    return rows


def large_sweep(count: int) -> list[Record]:
    """Rows of a sweep over five axes."""
    names = ("naive", "unfold", "blocked", "conv3x3", "conv1x1")
    rows = []
    for n in range(count // len(names)):
        channels, resolution = (32, 64, 128, 256, 512)[n % 5], (7, 14, 28, 56)[n // 5 % 4]
        batch, k = 1 + n // 200 % 10, 3 + 2 * (n // 20 % 10)
        case = Case(kernel_size=k, channels=channels, resolution=resolution, batch=batch, threads=2)
        for i, name in enumerate(names):
            rows.append(record(name, 1e-4 * (i + 1) * k, count=7, case=case, suite=f"suite{n // 2000}"))
    return rows
