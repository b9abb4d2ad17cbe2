"""The loop of a run: case x implementation -> exactly one Record, appended at once."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sasa_bench.case import Case
from sasa_bench.results.environment import EXPORTS, require_free_threads
from sasa_bench.results.fields import printable
from sasa_bench.results.file import UNUSABLE, Writer
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Part, Record, Results, Roof
from sasa_bench.results.revision import changed
from sasa_bench.results.statistics import is_noisy
from sasa_bench.suite import Suite
from sasa_bench.sweep.ahead import make_ahead
from sasa_bench.sweep.plan import Plan, Task, for_every_worker, plan, require_distinct, specs_of
from sasa_bench.sweep.shard import cut, require_one_meaning_of_threads
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing import conditions, probe
from sasa_bench.timing.process import Request, WorkerDied, WorkerRefused
from sasa_bench.timing.settings import Settings


@dataclass
class Summary:
    """How far a run is.

    total      rows of the plan, those that the file had before included
    had        rows that the file had before
    beside     cases that have rows of other implementations, which were measured earlier
    counts     status -> rows measured
    noisy      rows measured whose samples scatter too much to rank them, by statistics.is_noisy
    spent_s    stage -> seconds that the workers have spent in it
    phase, detail
               what is done before the first rows and after the last, in words
    """

    total: int
    had: int
    beside: int = 0
    phase: str = ""
    detail: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    spent_s: Counter[str] = field(default_factory=Counter)
    noisy: int = 0
    _last: dict[tuple[str, str, Case], Record] = field(default_factory=dict)

    def take(self, rows: Sequence[Record]) -> None:
        """Count these rows, in place of what an earlier worker found of them."""
        for row in rows:
            if before := self._last.get(row.key):
                self.counts[before.status] -= 1
                self.noisy -= is_noisy(before.samples_s)
            self._last[row.key] = row
            self.counts[row.status] += 1
            self.noisy += is_noisy(row.samples_s)
        self.counts += Counter()  # which drops what is 0

    @property
    def done(self) -> int:
        """Rows in the file."""
        return self.had + self.counts.total()


def run(
    suites: Sequence[Suite],
    impls: Sequence[str],
    out: Path,
    *,
    known: Results | None = None,
    machine: Machine | None = None,
    part: tuple[int, int] = (1, 1),
    settings: Settings | None = None,
    timeout_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[Summary, Sequence[Record]], object] = lambda summary, rows: None,
    locked: bool = False,
) -> Summary:
    """Check and measure every case of the suites with every implementation, and append the rows to `out`.

    impls         names or files that replace the implementations of the suites; none: those of the suites
    known         what `out` holds already, as plan.open_results reads it; its rows are not measured again
    machine       this machine; looked at now where it is not given
    part          (I, N): measure part I of N, cut by expected cost
    settings      when a measurement is precise enough
    timeout_s     seconds that each stage of a row may take
    environment   variables to set for the workers
    watch         called with the summary and no rows until the first measurement, then with the rows of each case, then
                  with none while other workers measure them again
    locked        whether the caller holds the lock of `out`

    Raises WorkerRefused for an unknown implementation and UnfitEnvironmentError where OpenMP binds threads, before
    anything is measured or written, and ResultsError where another process writes to `out`.
    """
    require_free_threads(os.environ)
    index, count = part
    if count > 1:
        require_one_meaning_of_threads(suites)
    here = machine or probe.detect()
    impls = list(dict.fromkeys(impls))
    chosen = settings or Settings()
    with TemporaryDirectory() as exports, Workers(timeout_s, {EXPORTS: exports} | dict(environment or {})) as workers:
        infos = describe(workers, specs_of(suites, impls))
        shard = suites if count == 1 else cut(suites, count, impls, infos)[index - 1]
        work = plan(shard, impls, infos, known, chosen.rounds, here.id)
        summary = Summary(work.done + work.rows, work.done, work.beside, spent_s=workers.spent_s)
        watch(summary, ())
        shard_of = Part(tuple(suite.name for suite in suites), count, index)
        with Writer(out, locked) as writer:
            if count > 1 and (known is None or shard_of not in known.parts):
                writer.part(shard_of)
            _write_head(work, writer, here, known)
            if not work.tasks and not (known and known.stopped):
                return summary
            began = conditions.before(here.id)
            writer.conditions(began.conditions)
            seeds = [random.randrange(1 << 31) for _ in work.tasks]

            def say(left: int) -> None:
                summary.phase, summary.detail = "compiling and exporting", f"{left} to go"
                watch(summary, ())

            make_ahead(work, seeds, workers, say)
            for turn, place, rows in _measure_all(work, seeds, workers, writer, here, known, chosen):
                if turn > 1:
                    summary.phase = f"again, by worker {turn} of {chosen.rounds}"
                    summary.detail = f"case {place + 1} of {len(work.tasks)}"
                else:
                    summary.phase = summary.detail = ""
                first = turn == work.tasks[place].workers + 1
                summary.spent_s = workers.spent_s
                summary.take(rows)
                watch(summary, rows if first else ())
            writer.conditions(conditions.after(began))
        summary.spent_s = workers.spent_s
    return summary


def describe(workers: Workers, specs: Sequence[str]) -> dict[str, ImplInfo]:
    """Name or file of an implementation -> what readers need to know of it.

    Raises WorkerRefused for one that is unknown or cannot be loaded, PlanError for two files of one name.
    """
    try:
        found = workers.get().ask("describe", impls=list(specs))
    except WorkerDied:
        workers.drop()
        found = [_describe_one(workers, spec) for spec in specs]
    infos = {spec: ImplInfo.from_dict(info) for spec, info in zip(specs, found, strict=True)}
    require_distinct({spec: info.name for spec, info in infos.items()})
    return infos


def _describe_one(workers: Workers, spec: str) -> Any:
    try:
        return workers.get().ask("describe", impls=[spec])[0]
    except WorkerDied as death:
        workers.drop()
        raise WorkerRefused(f"{spec} cannot be loaded: {death}") from None


def _write_head(work: Plan, writer: Writer, machine: Machine, known: Results | None) -> None:
    if known is None or machine.id not in known.machines:
        writer.machine(machine)
    writer.impls(info for info in work.impls.values() if known is None or known.impls.get(info.name) != info)


def _measure_all(
    work: Plan,
    seeds: Sequence[int],
    workers: Workers,
    writer: Writer,
    machine: Machine,
    known: Results | None,
    settings: Settings,
) -> Iterator[tuple[int, int, list[Record]]]:
    """Measure the tasks of a plan; yields the number of the worker, from 1, the place of the task, from 0, and the rows
    of the task as they are now.

    Every worker of `settings` goes over all tasks, so that what is measured of a case is spread over the run; rows are
    written again, whole, with what each worker adds, and a reader takes the last ones. A task that was begun goes on
    with the worker that it lacks, which checks it too.
    """
    roofs = dict(known.roofs) if known else {}
    measured: list[list[Record]] = [list(task.begun) for task in work.tasks]
    later = replace(settings.share(), energy_s=0.0)  # the first worker's figure stands
    for worker in range(settings.rounds):
        if worker:
            workers.drop()
        tried: set[tuple[str, str, str, int]] = set()
        for position, (task, seed) in enumerate(zip(work.tasks, seeds, strict=True)):
            if worker < task.workers:
                continue
            if not worker:
                found = _measure(work, workers, task, seed, settings.share())
                rows = [_record(work, task, spec, machine, values) for spec, values in found]
            elif (again := _worth_again(work, task, measured[position])).impls:
                check = worker == task.workers
                rows = _join(work, measured[position], dict(_measure(work, workers, again, seed, later, check)))
            else:
                continue
            measured[position] = rows
            roof = (machine.id, task.case.device, task.case.dtype, task.case.threads)
            if roof not in tried and any(row.status == "ok" for row in rows):
                tried.add(roof)
                if found_roof := _roof(workers, *roof):
                    roofs[roof] = found_roof.best_of(roofs.get(roof, found_roof))
                    writer.roof(roofs[roof])
            writer.rows(rows)
            yield worker + 1, position, rows


def _record(work: Plan, task: Task, spec: str, machine: Machine, values: dict[str, Any]) -> Record:
    info, count = work.impls[spec], len(values.get("samples_s", ()))
    bare = Record(
        suite=task.suite,
        impl=info.name,
        op=info.op,
        case=task.case,
        status="error",
        machine=machine.id,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        extra=info.source,
    )
    found = {"worker_samples": (count,) if count else ()} | values | {"extra": info.source | values.get("extra", {})}
    return _storable(lambda: replace(bare, **found), bare)


def _storable(make: Callable[[], Record], bare: Record) -> Record:
    """The row, or one that says why it cannot be stored: what no reader takes would make the whole file unreadable."""
    try:
        return Record.from_dict(json.loads(json.dumps(make().to_dict(), allow_nan=False)))
    except UNUSABLE as error:
        return replace(bare, reason=printable(f"its figures cannot be stored: {type(error).__name__}: {error}")[:300])


def _join(work: Plan, rows: Sequence[Record], found: Mapping[str, dict[str, Any]]) -> list[Record]:
    """The rows with what another worker found, by name or file of the implementation."""
    named = {work.impls[spec].name: values for spec, values in found.items()}
    return [_joined(row, named[row.impl]) if row.impl in named else row for row in rows]


def _joined(row: Record, values: dict[str, Any]) -> Record:
    bare = row.joined({"status": "error", "reason": ""})
    return _storable(lambda: row.joined(values), bare)


def _worth_again(work: Plan, task: Task, rows: Sequence[Record]) -> Task:
    """The task with the implementations that are ok and that every worker measures."""
    fine = {row.impl for row in rows if row.status == "ok" and for_every_worker(row)}
    return replace(task, impls=tuple(spec for spec in task.impls if work.impls[spec].name in fine))


def _measure(
    work: Plan, workers: Workers, task: Task, seed: int, settings: Settings, check: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(implementation, its Record fields) for each one of the task, whatever happens to the worker."""
    left, fresh = list(task.impls), False
    while left:
        request = Request(task.case, tuple(left), seed, asdict(settings), check)
        try:
            for spec, values in workers.get().measure(request):
                left.remove(spec)
                yield spec, values if _of_plan(work, spec, values) else _of_another_file(spec, values)
            if left:
                raise WorkerDied("error", "the worker returned no row", left[0], "time")
        except WorkerDied as death:
            workers.drop()
            if not left:  # it died behind its last row
                return
            if death.impl is None and not fresh:  # it died of what it did before
                fresh = True
                continue
            blamed = death.impl if death.impl in left else left[0]
            left.remove(blamed)
            yield blamed, {"status": death.status, "reason": str(death)}


def _of_plan(work: Plan, spec: str, values: dict[str, Any]) -> bool:
    """Whether a worker measured the file of the plan; sources that the file wrote beside itself are its own."""
    now = values.get("extra", {}).get("source_digest", "")
    if now in ("", work.impls[spec].digest):
        return True
    if changed(work.sources.get(spec, {})) or spec not in work.sources:
        return False
    values["extra"]["source_digest"] = work.impls[spec].digest
    return True


def _of_another_file(spec: str, values: dict[str, Any]) -> dict[str, Any]:
    """The row of a file that is not that of the plan, with the digest that it had: --resume measures it again."""
    reason = f"{spec} changed while the run went on: repeat the command with --resume"
    return {"status": "error", "reason": reason, "extra": {"source_digest": values["extra"]["source_digest"]}}


def _roof(workers: Workers, machine: str, device: str, dtype: str, threads: int) -> Roof | None:
    """The roof of a device; None where two workers failed, the first perhaps for what it had measured before."""
    for _ in range(2):
        try:
            figures = workers.get().ask("roof", device=device, dtype=dtype, threads=threads)
        except (WorkerDied, WorkerRefused):
            workers.drop()
        else:
            return Roof(machine, device, dtype, threads, *figures)
    return None
