"""The results file: JSON Lines, read whole and appended to.

Each line has a `kind`: `machine` and `impl` describe what rows refer to, `roof` holds the measured peak and bandwidth
of a device, `row` is a Record. Rows are appended as they are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from sasa_bench.case import UserError
from sasa_bench.results import pytest_benchmark as benchmark_json
from sasa_bench.results.fields import build, printable
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import Conditions, ImplInfo, Part, Record, Results, Roof


class ResultsError(UserError):
    """A file that cannot be read or written as results; the message states which, why and what to do."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever looks, and whatever ends this process, it is there whole or not at all.

    Its folder is made. What is no file, such as /dev/stdout, is written to, and a link goes on leading where it led.
    Raises OSError with the path, and ResultsError for a path that holds results of `run`.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with _naming(path):
            path.write_bytes(content)
        return
    place = Path(os.path.realpath(path))
    if _holds_results(place):
        raise ResultsError(f"{path} holds measured results, which this would replace: give --out another path")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    try:
        with _naming(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, place)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line of JSON, on the disk before this returns; what a kill left of the line before is cut off.

    Its folder is made. Raises OSError with the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), path.open("ab+") as file:
        _cut_partial_line(file)
        file.write(json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_partial_line(file: IO[bytes]) -> None:
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        content = file.read()
        begin = content.rfind(b"\n") + 1
        try:
            json.loads(content[begin:])
        except ValueError:
            file.truncate(begin)
            file.seek(0, os.SEEK_END)
        else:  # whole, and read as such: an editor took its end away
            file.write(b"\n")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """OSErrors inside name this path: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) if error.errno else error from None


def _holds_results(path: Path) -> bool:
    """Whether a file begins as `run` or pytest-benchmark begin theirs."""
    return path.is_file() and (_head(path).startswith(b'{"kind":') or is_of_pytest_benchmark(path))


def is_of_pytest_benchmark(path: Path) -> bool:
    """Whether a file begins as pytest-benchmark begins its own."""
    return _head(path).startswith(b'{"machine_info":')


def _head(path: Path) -> bytes:
    """How a file begins, without spaces between its words."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf").translate(None, b" \r\n\t")


def replace_text(path: Path, text: str) -> None:
    """As replace_file, in UTF-8."""
    replace_file(path, text.encode())


UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a line that is no line of a results file may raise."""


def read(paths: Sequence[Path]) -> Results:
    """Everything in these files. A truncated last line is left out with a warning; a run that did not end has one too.

    Of several rows of one case, implementation and hardware in a file the last counts: it was measured again there.

    A file that pytest-benchmark wrote of suites is read as well.

    Raises ResultsError for a file that is missing or not a results file.
    """
    results = Results()
    for path in paths:
        found = replace(results, rows=[], files=[], conditions=[])
        _read_into(found, path)
        if found.stopped:
            results.warnings.append(f"{path} has no end: its run goes on or was stopped; --resume measures the rest")
        results.conditions += found.conditions
        results.rows += _last_of_each(found)
        results.files += [str(path)] * (len(results.rows) - len(results.files))
    results.warnings += unlike_software(results)
    return results


def require_described(results: Results) -> None:
    """Raise ResultsError where rows come from a machine that no line describes."""
    if lost := sorted({row.machine for row in results.rows} - results.machines.keys()):
        raise ResultsError(
            f"rows come from the machine {printable(lost[0])}, which no line of kind machine describes: "
            "give a whole file that `sasa-bench run` wrote"
        )


def unlike_software(results: Results) -> list[str]:
    """A sentence for each library and variable that differs among the rows of one kind of hardware."""
    machines, said = results.used_machines(), []
    for hardware in results.hardware():
        alike = [machine for machine in machines if machine.hardware_id == hardware]
        for what, values in (("library", [m.libraries for m in alike]), ("variable", [m.environment for m in alike])):
            for name in sorted({name for each in values for name in each}):
                found = sorted({each.get(name, "absent") for each in values})
                if len(found) > 1:
                    said.append(
                        f"rows of {hardware} differ in the {what} {name} ({', '.join(found)}): they are shown, "
                        "and never compared with each other"
                    )
    return said


def _last_of_each(found: Results) -> list[Record]:
    kept: dict[tuple[Any, ...], Record] = {}
    hardware = {key: machine.hardware_id for key, machine in found.machines.items()}
    for row in found.rows:
        place = (*row.key, hardware.get(row.machine, row.machine))
        kept.pop(place, None)
        kept[place] = row
    return list(kept.values())


def _read_into(results: Results, path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such results file; `sasa-bench run` writes one") from None
    except IsADirectoryError:
        raise ResultsError(f"{path} is a folder: name its files, such as {path / '*.jsonl'}") from None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read as a results file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} cannot be read as a results file: it is not UTF-8 text ({error})") from None
    document = benchmark_json.parse(text)
    if document is not None:
        _read_benchmarks(results, path, document)
        return
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    seen_any = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        last = number == len(lines)
        try:
            _take(results, json.loads(line))
            seen_any = True
        except UNUSABLE as error:
            if last and seen_any and not text.endswith("\n"):
                results.warnings.append(
                    f"{path}: the last line is cut off and was left out; --resume measures it again"
                )
                return
            raise ResultsError(
                f"{path}, line {number}, is not a line of a results file ({_why(error)}); "
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
    except UNUSABLE as error:
        raise ResultsError(f"{path} of pytest-benchmark cannot be used ({_why(error)})") from None
    taken = len(results.rows) - before
    others = len(document["benchmarks"]) - taken
    if not taken:
        raise ResultsError(f"{path} of pytest-benchmark holds no case of a suite: `pytest suites/` measures them")
    if others:
        results.warnings.append(f"{path}: {others} benchmarks that are no cases of a suite were left out")


def _take(results: Results, line: Any) -> None:
    if not isinstance(line, dict):
        raise TypeError(f"a {type(line).__name__} instead of a table with a kind")
    kind = line.pop("kind")
    if kind == "row":
        results.rows.append(Record.from_dict(line))
    elif kind == "machine":
        results.machines[str(line.pop("id"))] = Machine.from_dict(line)
    elif kind == "impl":
        impl = ImplInfo.from_dict(line)
        results.impls[impl.name] = impl
    elif kind == "part":
        results.parts.add(build(Part, line))
    elif kind == "conditions":
        results.conditions.append(build(Conditions, line))
    elif kind == "roof":
        roof = build(Roof, line)
        place = roof.machine, roof.device, roof.dtype, roof.threads
        results.roofs[place] = roof.best_of(results.roofs.get(place, roof))
    else:
        raise ValueError(f"unknown kind {kind!r}")


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error))[:200]}"


class Writer:
    """Appends lines to a results file. Each write reaches the disk before the next begins or is taken back whole.

    So a kill, a power failure or a full disk loses at most the rows in progress. Raises ResultsError where the file
    cannot be opened or written; what was written before stays. No other Writer may have the file at the same time,
    unless `locked` says that the caller has seen to that.
    """

    def __init__(self, path: Path, locked: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab+", buffering=0)
            if not locked:
                self._lock()
            _cut_partial_line(self.file)
        except OSError as error:
            raise self._refused(error, "give --out another path") from None

    def _lock(self) -> None:
        """Keep other writers out; where a file system has no locks, nobody is kept out."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise ResultsError(
                f"another process writes to {self.path}: wait until it ends, or give another --out"
            ) from None
        except OSError:
            pass

    def _refused(self, error: OSError, remedy: str) -> ResultsError:
        return ResultsError(f"{self.path} cannot be written ({error.strerror or error}): {remedy}")

    def machine(self, machine: Machine) -> None:
        """Describe a machine that rows refer to by its id."""
        self._write([{"kind": "machine", "id": machine.id} | machine.to_dict()])

    def roof(self, roof: Roof) -> None:
        """Store a measured roof."""
        self._write([{"kind": "roof"} | asdict(roof)])

    def conditions(self, conditions: Conditions) -> None:
        """Store what the machine was busy with."""
        self._write([{"kind": "conditions"} | asdict(conditions)])

    def part(self, part: Part) -> None:
        """Say which part of a run in shards the file holds."""
        self._write([{"kind": "part"} | asdict(part)])

    def impls(self, impls: Iterable[ImplInfo]) -> None:
        """Describe implementations that rows refer to by name."""
        self._write([{"kind": "impl"} | asdict(impl) for impl in impls])

    def rows(self, rows: Iterable[Record]) -> None:
        """Append rows in one write."""
        self._write([row.to_dict() for row in rows])

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        content = memoryview(b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines))
        before = self.file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[self.file.write(content) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(before)
            remedy = "rows written before are kept; free some space, then repeat the command with --out and --resume"
            raise self._refused(error, remedy) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
