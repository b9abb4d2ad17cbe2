"""Results of several files as one, the same whatever the order of the files."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from sasa_bench.case import AXES, CHOICES, Case
from sasa_bench.results.file import ResultsError, Writer, unlike_software
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import Conditions, ImplInfo, Part, Record, Results, Roof


class MergeConflictError(ResultsError):
    """Rows that were measured more than once; `conflicts` has a sentence for each."""

    def __init__(self, conflicts: Sequence[str]) -> None:
        rows = "1 row was" if len(conflicts) == 1 else f"{len(conflicts)} rows were"
        super().__init__(
            f"{rows} measured more than once on one kind of machine, with different results: merge one of each"
        )
        self.conflicts = tuple(conflicts)


@dataclass
class Merged:
    """`results` in canonical order.

    duplicates   a sentence for each row that several files hold, byte for byte the same
    missing      a sentence for each run in shards of which no file holds some parts
    apart        how many cases have rows that no single file holds together, so that they were not interleaved
    """

    results: Results
    duplicates: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    apart: int = 0


def merge(parts: Sequence[tuple[str, Results]]) -> Merged:
    """The results of several files as one, the same whatever the order of `parts`, pairs of a file's name and content.

    A row is known by suite, implementation, case and hardware: unlike machines keep a row each. Of equal rows one
    stays. Of several roofs of one machine the highest peak and bandwidth stay, as each is the best of several tries.

    Raises MergeConflictError for rows of one key that differ.
    """
    merged = Merged(Results())
    machines: dict[str, set[str]] = defaultdict(set)
    impls: dict[str, list[ImplInfo]] = defaultdict(list)
    roofs: dict[tuple[str, str, str, int], list[Roof]] = defaultdict(list)
    for _, part in parts:
        for key, machine in part.machines.items():
            machines[key].add(_text(machine.to_dict()))
        for name, info in part.impls.items():
            impls[name].append(info)
        for place, roof in part.roofs.items():
            roofs[place].append(roof)
        merged.results.warnings += part.warnings
    results = merged.results
    results.machines = {key: Machine.from_dict(json.loads(min(texts))) for key, texts in sorted(machines.items())}
    newest = {name: max(infos, key=lambda info: (info.index, *astuple(info))) for name, infos in impls.items()}
    results.impls = dict(sorted(newest.items(), key=lambda item: (item[1].index, item[0])))
    results.roofs = {place: reduce(Roof.best_of, found) for place, found in sorted(roofs.items())}
    results.conditions = sorted(dict.fromkeys(c for _, part in parts for c in part.conditions), key=_when)
    results.rows, merged.duplicates, merged.apart = _merge_rows(parts, results)
    results.warnings += unlike_software(results)
    results.parts, merged.missing = _incomplete({part for _, each in parts for part in each.parts})
    return merged


def _incomplete(parts: set[Part]) -> tuple[set[Part], list[str]]:
    """The parts of runs in shards that are not whole, and a sentence for each such run."""
    kept, said = set(), []
    for suites, count in sorted({(part.suites, part.count) for part in parts}):
        found = {part for part in parts if (part.suites, part.count) == (suites, count)}
        lacking = sorted(set(range(1, count + 1)) - {part.number for part in found})
        if lacking:
            kept |= found
            said.append(f"{', '.join(suites)}: no file holds {', '.join(f'{number}/{count}' for number in lacking)}")
    return kept, said


def _merge_rows(parts: Sequence[tuple[str, Results]], results: Results) -> tuple[list[Record], list[str], int]:
    found: dict[tuple[Any, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, part in parts:
        for row in part.rows:
            found[(*row.key, _hardware(row, results))][_text(row.to_dict())].append(name)
    rows, duplicates, conflicts = [], [], []
    for (suite, impl, case, hardware), versions in found.items():
        what = f"{suite}, {impl}, {case.describe()}, on {hardware}"
        if len(versions) > 1:
            files = (
                f"{name} (started {json.loads(text)['started_at']})"
                for text, names in versions.items()
                for name in names
            )
            conflicts.append(f"{what}: {' and '.join(sorted(files))}")
        for text, names in versions.items():
            rows.append(Record.from_dict(json.loads(text)))
            if len(names) > 1:
                duplicates.append(f"{what}: {' and '.join(sorted(names))}")
    if conflicts:
        raise MergeConflictError(sorted(conflicts))
    return sorted(rows, key=lambda row: _place(row, results)), sorted(duplicates), _measured_apart(found)


def _measured_apart(found: Mapping[tuple[Any, ...], Mapping[str, Sequence[str]]]) -> int:
    """How many cases on one kind of machine have rows that no single file holds together."""
    together: dict[tuple[Any, ...], set[str]] = {}
    for (suite, _, case, hardware), versions in found.items():
        names = {name for each in versions.values() for name in each}
        together[suite, case, hardware] = together.get((suite, case, hardware), names) & names
    return sum(not names for names in together.values())


def _when(conditions: Conditions) -> tuple[str, ...]:
    return conditions.at, conditions.machine, conditions.moment, _text(asdict(conditions))


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _hardware(row: Record, results: Results) -> str:
    machine = results.machines.get(row.machine)
    return machine.hardware_id if machine else row.machine


def _place(row: Record, results: Results) -> tuple[Any, ...]:
    impl = results.impls.get(row.impl)
    return row.suite, _order(row.case), impl.index if impl else -1, row.impl, _hardware(row, results)


def _order(case: Case) -> tuple[Any, ...]:
    """Cases in the order of the axes: numbers by size, choices as listed, maps by height and width."""
    values = case.to_dict() | {"resolution": (case.height, case.width)}
    return tuple(CHOICES[axis].index(values[axis]) if axis in CHOICES else values[axis] for axis in AXES)


def write(results: Results, path: Path) -> None:
    """Write a merged results file in one step: it is there whole or not at all. A link goes on leading where it led."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with Writer(partial) as writer:
            for machine in results.machines.values():
                writer.machine(machine)
            writer.impls(results.impls.values())
            for part in sorted(results.parts):
                writer.part(part)
            for roof in results.roofs.values():
                writer.roof(roof)
            for found in results.conditions:
                writer.conditions(found)
            writer.rows(results.rows)
        os.replace(partial, path)
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}): give --out another path") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
