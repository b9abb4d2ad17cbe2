"""What a run will do: the cases of suites and their implementations, less the rows that the results file has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sasa_bench.case import Case, UserError
from sasa_bench.results.file import ResultsError, is_of_pytest_benchmark, read
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record, Results
from sasa_bench.results.revision import Stamps, stamps
from sasa_bench.suite import Suite
from sasa_bench.timing.probe import available_cores


class PlanError(UserError):
    """What cannot be measured as asked; the message states what to change."""


@dataclass(frozen=True)
class Task:
    """One case of a suite and its implementations, by name or file; measured interleaved.

    begun  rows of all of them that some workers of a run that was stopped have measured, alike; else none
    """

    suite: str
    case: Case
    impls: tuple[str, ...]
    begun: tuple[Record, ...] = ()

    @property
    def workers(self) -> int:
        """How many workers have measured `begun`; those that take long to build have one."""
        return max((len(row.worker_samples) for row in self.begun), default=0)


@dataclass
class Plan:
    """What a run will do: `tasks`, how many rows the file has already, and every implementation by name or file.

    beside  tasks of whose case the file has rows of other implementations, which are not measured again
    sources of implementations from files: what lies beside each, as it was when the plan was made
    """

    tasks: list[Task]
    done: int
    impls: dict[str, ImplInfo]
    beside: int = 0
    sources: dict[str, Stamps] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows still to be measured."""
        return sum(len(task.impls) for task in self.tasks)


def specs_of(suites: Sequence[Suite], impls: Sequence[str]) -> list[str]:
    """Every implementation that the suites need, each once: `impls`, where given, else those of the suites."""
    return list(impls) or list(dict.fromkeys(impl for suite in suites for impl in suite.impls))


def require_distinct(names: Mapping[str, str]) -> None:
    """Raise PlanError where two of the specs, name or file -> name of the implementation, have one name."""
    for name in names.values():
        same = [other for other, its in names.items() if its == name]
        if len(same) > 1:
            raise PlanError(
                f"{' and '.join(same)} are both called {name!r}, and their rows could not be distinguished: "
                "give each a name of its own, the first argument of local_attention(...), or "
                "dataclasses.replace(IMPL, name=...)"
            )


LONG_BUILD_S = 5.0
"""What takes longer to build is measured by one worker alone, but for convolutions, which all others are compared
with."""


def for_every_worker(row: Record) -> bool:
    """Whether every worker of a run builds and measures it, as it is quick or a convolution."""
    return row.op == "convolution" or float(row.extra.get("build_s", 0.0)) < LONG_BUILD_S


def plan(
    suites: Sequence[Suite],
    impls: Sequence[str],
    infos: dict[str, ImplInfo],
    finished: Results | None = None,
    rounds: int = 1,
    machine: str = "",
) -> Plan:
    """Every case of the suites with its implementations (`impls`, where given), less the cases in `finished`.

    A case that lacks a row, or has one of a file that has changed since, is measured whole: its implementations are
    compared with each other, and that takes interleaved rounds. One that fewer than `rounds` workers have measured
    before the run was stopped is continued on the same `machine`, and measured whole on another one. A case that asks
    for 0 threads gets every core this process may use.
    """
    cores = available_cores()
    known = {row.key: row for row in finished.rows} if finished else {}
    whole = [row for row in known.values() if not cut_short(row, rounds)]
    have = {row.key: row.extra.get("source_digest", "") for row in whole}
    names: dict[tuple[str, Case], set[str]] = defaultdict(set)
    for row in whole:
        names[row.suite, row.case].add(row.impl)
    tasks, done, beside = [], 0, 0
    for suite in suites:
        wanted = tuple(impls) or suite.impls
        for resolved in dict.fromkeys(case if case.threads else case.with_(threads=cores) for case in suite.cases):
            found = [have.get((suite.name, infos[impl].name, resolved)) for impl in wanted]
            if found == [infos[impl].digest for impl in wanted]:
                done += len(wanted)
            else:
                begun = [known.get((suite.name, infos[impl].name, resolved)) for impl in wanted]
                tasks.append(Task(suite.name, resolved, wanted, _continued(begun, wanted, infos, rounds, machine)))
                beside += not names[suite.name, resolved] <= {infos[impl].name for impl in wanted}
    sources = {spec: stamps(Path(spec)) for spec, info in infos.items() if info.digest and Path(spec).is_file()}
    return Plan(tasks, done, infos, beside, sources)


def _continued(
    rows: Sequence[Record | None], impls: Sequence[str], infos: Mapping[str, ImplInfo], rounds: int, machine: str
) -> tuple[Record, ...]:
    """The rows of a case, where every worker so far has measured all of them, here and of the files as they are."""
    found = [row for row in rows if row is not None]
    workers = {len(row.worker_samples) for row in found if row.status == "ok" and for_every_worker(row)}
    alike = len(found) == len(rows) and len(workers) == 1 and 0 < max(workers) < rounds
    same = [(row.machine, row.extra.get("source_digest", "")) for row in found]
    return tuple(found) if alike and same == [(machine, infos[impl].digest) for impl in impls] else ()


def cut_short(row: Record, rounds: int) -> bool:
    """Whether fewer than `rounds` workers have measured a row, as a run was stopped."""
    return row.status == "ok" and 0 < len(row.worker_samples) < rounds and for_every_worker(row)


def open_results(out: Path, resume: bool, machine: Machine) -> Results | None:
    """What `out` holds already, or None for a new file.

    What differs between its rows and this machine is among its warnings. Raises ResultsError for a file that is there
    without `resume`, or that comes from unlike hardware, other code of sasa-bench or other versions of libraries.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if existing != out and not existing.is_dir():
        raise ResultsError(f"{existing} is a file, so there can be no {out}: give --out another path")
    if existing != out or (out.is_file() and not out.stat().st_size):
        return None
    if out.is_dir():
        raise ResultsError(f"{out} is a folder: name a results file, such as {out / 'results.jsonl'}")
    if not out.is_file():
        raise ResultsError(f"{out} is a device or a pipe: name a results file, such as results.jsonl")
    if not resume:
        raise ResultsError(f"{out} already exists: pass --resume to continue it, or another --out to start a new one")
    if is_of_pytest_benchmark(out):
        raise ResultsError(f"{out} is a file of pytest-benchmark, to which no rows can be added: give another --out")
    results = read([out])
    others = [hardware for hardware in results.hardware() if hardware != machine.hardware_id]
    if others:
        raise ResultsError(
            f"{out} was measured on {', '.join(others)}, and this is {machine.hardware_id}: rows of unlike machines "
            "do not belong in one file; give another --out"
        )
    before = results.used_machines()
    require_same_software(out, before, machine)
    lacked = {key: machine.libraries.keys() - found.libraries.keys() for key, found in results.machines.items()}
    again = [row for row in results.rows if row.status == "skipped" and lacked.get(row.machine)]
    if again:
        added = sorted({name for row in again for name in lacked[row.machine]})
        results.warnings.append(f"{out} was measured without {', '.join(added)}: skipped rows are tried again")
        results.drop(again)
    for what, then, now in (
        ("sasa-bench", {found.revision for found in before}, machine.revision),
        ("Python", {found.python for found in before}, machine.python),
    ):
        if then - {now}:
            results.warnings.append(f"{out} has rows of {what} {', '.join(sorted(then - {now}))}, and this is {now}")
    for change in sorted({c for found in before for c in _changes(found.environment, machine.environment, "unset")}):
        results.warnings.append(f"{out} has rows of another environment: {change}")
    return results


def require_same_software(out: Path, before: Sequence[Machine], here: Machine) -> None:
    """Raise ResultsError where rows of `out`, measured as `before` says, and rows of `here` do not belong together.

    Revisions whose measuring code is the same, as after a change of documentation or reports, belong together.
    """
    if other := sorted({found.revision for found in before if _code(found) != _code(here, not found.code)}):
        raise ResultsError(
            f"{out} was measured by another sasa-bench ({', '.join(other)}; this is {here.revision}, with other files "
            "that decide what is measured), and rows of the two cannot be compared: give another --out, or use that "
            "revision again"
        )
    if moved := sorted({change for found in before for change in _changes(found.libraries, here.libraries)}):
        raise ResultsError(
            f"{out} was measured with other versions ({', '.join(moved)}), and rows of the two cannot be compared: "
            "give another --out, or install those versions again"
        )


def _code(machine: Machine, old: bool = False) -> str:
    """What a machine's sasa-bench is known by; of a file from before there was a digest, its revision."""
    return machine.revision if old or not machine.code else machine.code


def _changes(then: Mapping[str, str], now: Mapping[str, str], absent: str = "") -> list[str]:
    """What differs, as sentences; a name that one of the two lacks counts where `absent` says how to write that."""
    names = then.keys() | now.keys() if absent else then.keys() & now.keys()
    return [
        f"{name} {then.get(name, absent)}, now {now.get(name, absent)}"
        for name in sorted(names)
        if then.get(name, absent) != now.get(name, absent)
    ]
