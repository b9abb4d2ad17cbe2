"""The results file: JSON Lines, read whole and appended to.

Each line has a `kind`: `machine` and `impl` describe what rows refer to, `roof` holds the measured peak and bandwidth
of a device, `row` is a Record. Rows are appended as they are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sasa_bench.case import UserError
from sasa_bench.results import pytest_benchmark as benchmark_json
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record, Results, Roof


class ResultsError(UserError):
    """A file that cannot be read or written as results; the message says which, why and what to do."""


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
