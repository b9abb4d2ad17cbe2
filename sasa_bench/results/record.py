"""Record: one tidy row for each case and implementation, and the results file that holds them.

A results file is JSON Lines. Each line has a `kind`: `machine` and `impl` describe what rows refer to, `roof` holds the
measured peak and bandwidth of a device, `row` is a Record. Rows are appended as they are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sasa_bench.case import AXES, Case, UserError, from_dict
from sasa_bench.results import pytest_benchmark as benchmark_json
from sasa_bench.results.machine import Machine

DIFFERS = "†"
"""Stands behind the name of an implementation that computes another function than those it is compared with."""

STATUSES = ("ok", "skipped", "wrong", "error", "timeout")


class ResultsError(UserError):
    """A file that cannot be read or written as results; the message says which, why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case x implementation.

    samples_s holds seconds per call, one value for each round, each the mean of `inner_count` calls. A row that is not
    ok has a reason and no samples. cold_samples_s, where there are any, are seconds of single calls that found none of
    their data in the GPU's L2 cache. max_abs_err and err_budget belong to the output nearest to (or furthest over) its
    budget. `extra` holds figures that only some implementations have, by column name.
    """

    suite: str
    impl: str
    op: str
    case: Case
    status: str
    reason: str = ""
    samples_s: tuple[float, ...] = ()
    inner_count: int = 0
    cold_samples_s: tuple[float, ...] = ()
    flops: int | None = None
    params: int | None = None
    min_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_source: str = ""
    max_abs_err: float | None = None
    err_budget: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    started_at: str = ""

    @property
    def key(self) -> tuple[str, str, Case]:
        """What a file holds at most once."""
        return self.suite, self.impl, self.case

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored."""
        return (
            {"kind": "row"}
            | asdict(self)
            | {
                "samples_s": list(self.samples_s),
                "cold_samples_s": list(self.cold_samples_s),
            }
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """The inverse of to_dict."""
        known = {f.name for f in fields(cls)}
        plain = {name: value for name, value in values.items() if name in known}
        samples = {name: tuple(values.get(name, ())) for name in ("samples_s", "cold_samples_s")}
        return cls(**plain | samples | {"case": from_dict(values["case"])})


@dataclass(frozen=True)
class Column:
    """unit: of the stored value; label: for people; format: how a text table prints it."""

    unit: str
    label: str
    format: str = "text"


_CASE_UNITS = {"kernel_size": "pixels", "channels": "channels", "resolution": "pixels", "batch": "images"}

COLUMNS: dict[str, Column] = (
    {
        "suite": Column("", "suite"),
        "impl": Column("", "implementation"),
        "op": Column("", "op"),
        "status": Column("", "status"),
        "reason": Column("", "reason"),
    }
    | {axis: Column(_CASE_UNITS.get(axis, ""), axis.replace("_", " ")) for axis in AXES}
    | {
        "time_median_s": Column("s", "time, median", "time"),
        "time_p20_s": Column("s", "time, p20", "time"),
        "time_p80_s": Column("s", "time, p80", "time"),
        "sample_count": Column("", "samples", "count"),
        "flops": Column("FLOP", "FLOPs", "si"),
        "params": Column("", "parameters", "si"),
        "min_bytes": Column("B", "least traffic", "bytes"),
        "peak_memory_bytes": Column("B", "peak memory", "bytes"),
        "memory_source": Column("", "memory source"),
        "max_abs_err": Column("", "largest error", "error"),
        "err_budget": Column("", "error budget", "error"),
        "flops_per_s": Column("FLOP/s", "FLOP/s", "si"),
        "roofline_fraction": Column("", "of roofline", "percent"),
        "time_vs_conv3x3": Column("", "time / conv3x3", "ratio"),
        "machine": Column("", "machine"),
        "commit": Column("", "commit"),
        "started_at": Column("", "started at"),
    }
)
"""The columns of the tidy table, in order."""


@dataclass(frozen=True)
class Roof:
    """What a device can do at most: a large matrix product and a large copy, measured on `machine`."""

    machine: str
    device: str
    dtype: str
    threads: int
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class ImplInfo:
    """An implementation as a reader knows it; `index` is its place in the registry and gives it its colour.

    differs    how its function differs from the attention it stands next to; "" where it does not
    exports    the implementation whose formulation this one runs from an exported file; "" for one that is no export
    any_size   whether that file serves maps of every size
    library    whether it needs a library of custom operators beside it

    Files written before the last four were known have none of them.
    """

    name: str
    op: str
    summary: str
    index: int
    differs: str = ""
    exports: str = ""
    any_size: bool = False
    library: bool = False

    @property
    def label(self) -> str:
        """The name, marked where the function differs."""
        return self.name + DIFFERS if self.differs else self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImplInfo:
        """From a results file or a worker's answer, which may say more."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass
class Results:
    """Everything in one or more results files; `warnings` are sentences about lines that could not be used."""

    rows: list[Record] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    impls: dict[str, ImplInfo] = field(default_factory=dict)
    roofs: dict[tuple[str, str, str, int], Roof] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def hardware(self) -> dict[str, Machine]:
        """The distinct hardware among the machines of the rows, by hardware_id."""
        used = {row.machine for row in self.rows}
        return {m.hardware_id: m for key, m in self.machines.items() if key in used}


def read(paths: Sequence[Path]) -> Results:
    """Everything in these files. A truncated last line is left out with a warning.

    A file that pytest-benchmark wrote of suites is read as well.

    Raises ResultsError for a file that is missing or not a results file.
    """
    results = Results()
    for path in paths:
        _read_into(results, path)
    return results


def _read_into(results: Results, path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such results file; `sasa-bench run` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read as a results file: {error}") from None
    document = benchmark_json.parse(text)
    if document is not None:
        _read_benchmarks(results, path, document)
        return
    lines = text.splitlines()
    seen_any = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        last = number == len(lines)
        try:
            _take(results, json.loads(line))
            seen_any = True
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if last and seen_any and not text.endswith("\n"):
                results.warnings.append(f"{path}: the last line is cut off and was left out; --resume measures it anew")
                return
            raise ResultsError(
                f"{path}, line {number}, is not a line of a results file ({type(error).__name__}: {error}); "
                "give a .jsonl file that `sasa-bench run` wrote"
            ) from None
    if not seen_any:
        raise ResultsError(f"{path} is empty: the run that wrote it stopped before its first line")


def _read_benchmarks(results: Results, path: Path, document: dict[str, Any]) -> None:
    before = len(results.rows)
    try:
        for line in benchmark_json.lines(document):
            _take(results, line)
    except KeyError as error:
        hint = "it was saved without its samples" if error.args == ("data",) else f"it lacks {error}"
        raise ResultsError(
            f"{path} of pytest-benchmark cannot be used, {hint}: write it with --benchmark-json, or add "
            "--benchmark-save-data"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} of pytest-benchmark cannot be used ({type(error).__name__}: {error})") from None
    taken = len(results.rows) - before
    others = len(document["benchmarks"]) - taken
    if not taken:
        raise ResultsError(f"{path} of pytest-benchmark holds no case of a suite: `pytest suites/` measures them")
    if others:
        results.warnings.append(f"{path}: {others} benchmarks that are no cases of a suite were left out")


def _take(results: Results, line: dict[str, Any]) -> None:
    kind = line.pop("kind")
    if kind == "row":
        results.rows.append(Record.from_dict(line))
    elif kind == "machine":
        key = line.pop("id")
        results.machines[key] = Machine.from_dict(line)
    elif kind == "impl":
        results.impls[line["name"]] = ImplInfo.from_dict(line)
    elif kind == "roof":
        roof = Roof(**line)
        results.roofs[roof.machine, roof.device, roof.dtype, roof.threads] = roof
    else:
        raise ValueError(f"unknown kind {kind!r}")


class Writer:
    """Appends lines to a results file; each write is flushed, so a kill loses at most the line in progress."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        self._cut_partial_line()

    def _cut_partial_line(self) -> None:
        size = self.file.seek(0, os.SEEK_END)
        if not size:
            return
        self.file.seek(0)
        content = self.file.read()
        if not content.endswith(b"\n"):
            self.file.truncate(content.rfind(b"\n") + 1)
            self.file.seek(0, os.SEEK_END)

    def machine(self, machine: Machine) -> None:
        """Describe a machine that rows refer to by its id."""
        self._write([{"kind": "machine", "id": machine.id} | machine.to_dict()])

    def roof(self, roof: Roof) -> None:
        """Store a measured roof."""
        self._write([{"kind": "roof"} | asdict(roof)])

    def impls(self, impls: Iterable[ImplInfo]) -> None:
        """Describe implementations that rows refer to by name."""
        self._write([{"kind": "impl"} | asdict(impl) for impl in impls])

    def rows(self, rows: Iterable[Record]) -> None:
        """Append rows in one write."""
        self._write([row.to_dict() for row in rows])

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        self.file.write(b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
