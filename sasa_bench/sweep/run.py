"""The loop of a run: case x implementation -> exactly one Record, appended at once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sasa_bench.case import Case
from sasa_bench.results.file import ResultsError, Writer, read
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record, Results, Roof
from sasa_bench.suite import Suite
from sasa_bench.timing.probe import available_cores
from sasa_bench.timing.process import Request, Worker, WorkerDied
from sasa_bench.timing.settings import Settings


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


def describe(workers: Workers, specs: Sequence[str]) -> dict[str, ImplInfo]:
    """Name or file of an implementation -> what readers need to know of it. Raises WorkerRefused for an unknown one."""
    found = workers.get().ask("describe", impls=list(specs))
    return {spec: ImplInfo.from_dict(info) for spec, info in zip(specs, found, strict=True)}


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


def execute(
    work: Plan, workers: Workers, writer: Writer, machine: Machine, known: Results | None, settings: Settings
) -> Iterator[list[Record]]:
    """Measure the tasks of a plan; yields the rows of each task after they were written."""
    if known is None or machine.id not in known.machines:
        writer.machine(machine)
    writer.impls(info for info in work.impls.values() if known is None or info.name not in known.impls)
    roofs = set(known.roofs) if known else set()
    seeds = random.Random()
    for task in work.tasks:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [
            Record(
                suite=task.suite,
                impl=work.impls[spec].name,
                op=work.impls[spec].op,
                case=task.case,
                machine=machine.id,
                started_at=started,
                **values,
            )
            for spec, values in _measure(workers, task, seeds.randrange(1 << 31), settings)
        ]
        roof = (machine.id, task.case.device, task.case.dtype, task.case.threads)
        if roof not in roofs and any(row.status == "ok" for row in rows):
            roofs.add(roof)
            writer.roof(_roof(workers, *roof))
        writer.rows(rows)
        yield rows


def _measure(workers: Workers, task: Task, seed: int, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """(implementation, its Record fields) for each one of the task, whatever happens to the worker."""
    left = list(task.impls)
    while left:
        request = Request(task.case, tuple(left), seed, asdict(settings))
        try:
            for spec, values in workers.get().measure(request):
                left.remove(spec)
                yield spec, values
            if left:
                raise WorkerDied("error", "the worker gave no row", left[0], "time")
        except WorkerDied as death:
            workers.drop()
            blamed = death.impl if death.impl in left else left[0]
            left.remove(blamed)
            yield blamed, {"status": death.status, "reason": str(death)}


def _roof(workers: Workers, machine: str, device: str, dtype: str, threads: int) -> Roof:
    peak, bandwidth = workers.get().ask("roof", device=device, dtype=dtype, threads=threads)
    return Roof(machine, device, dtype, threads, peak, bandwidth)


class Workers:
    """The worker in use; a new one is started when the last one died.

    `timeout_s` bounds each stage of its work; `environment` is added to its environment. `spent_s` holds the seconds
    that each stage has taken, over all workers that were in use.
    """

    def __init__(self, timeout_s: float, environment: Mapping[str, str] | None = None) -> None:
        self.timeout_s, self.environment = timeout_s, environment
        self.worker: Worker | None = None
        self._spent_before = Counter[str]()

    @property
    def spent_s(self) -> Counter[str]:
        """Stage -> seconds."""
        return self._spent_before + Counter(self.worker.spent_s if self.worker else {})

    def get(self) -> Worker:
        """The live worker."""
        if self.worker is None:
            self.worker = Worker(self.timeout_s, environment=self.environment)
        return self.worker

    def drop(self) -> None:
        """End the worker; the next `get` starts another."""
        if self.worker is not None:
            self._spent_before = self.spent_s
            self.worker.close()
            self.worker = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.drop()
