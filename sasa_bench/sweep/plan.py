"""What a run will do: the cases of suites and their implementations, less the rows that the results file has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sasa_bench.case import Case
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Results
from sasa_bench.suite import Suite
from sasa_bench.timing.probe import available_cores


@dataclass(frozen=True)
class Task:
    """One case of a suite and the implementations, by name or file, that have no row yet; measured interleaved."""

    suite: str
    case: Case
    impls: tuple[str, ...]


@dataclass
class Plan:
    """What a run will do: `tasks`, how many rows the file has already, and every implementation by name or file."""

    tasks: list[Task]
    done: int
    impls: dict[str, ImplInfo]

    @property
    def rows(self) -> int:
        """Rows still to be measured."""
        return sum(len(task.impls) for task in self.tasks)


def specs_of(suites: Sequence[Suite], impls: Sequence[str]) -> list[str]:
    """Every implementation that the suites need, each once: `impls`, where given, else those of the suites."""
    return list(impls) or list(dict.fromkeys(impl for suite in suites for impl in suite.impls))


def plan(
    suites: Sequence[Suite], impls: Sequence[str], infos: dict[str, ImplInfo], finished: Results | None = None
) -> Plan:
    """Every case of the suites with its implementations (`impls`, where given), less the rows in `finished`.

    A case that asks for 0 threads gets every core this process may use.
    """
    cores = available_cores()
    have = {row.key for row in finished.rows} if finished else set()
    tasks, done = [], 0
    for suite in suites:
        wanted = tuple(impls) or suite.impls
        for case in suite.cases:
            resolved = case if case.threads else case.with_(threads=cores)
            left = tuple(impl for impl in wanted if (suite.name, infos[impl].name, resolved) not in have)
            done += len(wanted) - len(left)
            if left:
                tasks.append(Task(suite.name, resolved, left))
    return Plan(tasks, done, infos)


def open_results(out: Path, resume: bool, machine: Machine) -> Results | None:
    """What `out` holds already, or None for a new file.

    Raises ResultsError for a file that is there without `resume`, or that comes from unlike hardware.
    """
    if not out.exists() or not out.stat().st_size:
        return None
    if not resume:
        raise ResultsError(f"{out} is there already: --resume finishes it, another --out starts a new one")
    results = read([out])
    others = [hardware for hardware in results.hardware() if hardware != machine.hardware_id]
    if others:
        raise ResultsError(
            f"{out} was measured on {', '.join(others)}, and this is {machine.hardware_id}: rows of unlike machines "
            "do not belong in one file; give another --out"
        )
    return results
