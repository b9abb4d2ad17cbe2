"""Sweeps on a Slurm cluster: the tasks of an array job measure shards of suites.

Everything a sweep needs to go on lies in one folder that submitter and nodes share: what to measure (plan.json), what
was submitted (jobs.jsonl), the rows of each task (0000.jsonl and so on). A task measures only what its file lacks.
"""

from __future__ import annotations

import functools
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from sasa_bench.case import Case, from_dict
from sasa_bench.results.file import read
from sasa_bench.results.merge import Merged, merge
from sasa_bench.results.record import ImplInfo, Record, Results
from sasa_bench.suite import Suite
from sasa_bench.sweep.cluster import MOST_TASKS, Options, SlurmError, locked, read_plan, write_whole
from sasa_bench.sweep.plan import cut_short, require_same_software
from sasa_bench.sweep.shard import cut, expected_s, require_one_meaning_of_threads
from sasa_bench.timing.probe import available_cores, detect

TASK_S = 600.0
"""Expected seconds of a task where the number of tasks is not given: long next to its start, short next to a limit."""


@dataclass(frozen=True)
class Sweep:
    """What is measured, as plan.json in `folder` holds it: a shard for each task, and how to measure it.

    digests  of the files of implementations, by path
    """

    folder: Path
    name: str
    shards: tuple[tuple[Suite, ...], ...]
    impls: tuple[str, ...]
    budget_s: float
    timeout_s: float
    digests: Mapping[str, str] = field(default_factory=dict)

    def file(self, index: int) -> Path:
        """The results file of a task."""
        return self.folder / f"{index:04}.jsonl"

    def size(self, index: int) -> int:
        """Rows that a task gives."""
        return sum(len(suite.cases) * len(self.impls or suite.impls) for suite in self.shards[index])

    def done(self, index: int) -> Fraction:
        """Rows of a task that were measured; one that some of its workers have measured counts in part."""
        from sasa_bench.timing.settings import Settings

        return count_rows(self.file(index), Settings(budget_s=self.budget_s).rounds, _of_every_core(self.shards[index]))

    def missing(self) -> dict[int, int]:
        """Rows still to be measured, by task; a finished task is left out."""
        left = {index: math.ceil(self.size(index) - self.done(index)) for index in range(len(self.shards))}
        return {index: rows for index, rows in left.items() if rows > 0}

    def merged(self) -> Merged:
        """The rows of all tasks so far. Raises ResultsError, or MergeConflictError for what was measured twice."""
        files = [(self.file(index), shard) for index, shard in enumerate(self.shards)]
        return merge([(path.name, _last_only(read([path]), shard)) for path, shard in files if count_rows(path)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values; each shard lists its cases by suite and place."""
        whole = _join(self.shards)
        places = {(suite.name, case): place for suite in whole for place, case in enumerate(suite.cases)}
        return {
            "name": self.name,
            "impls": list(self.impls),
            "budget_s": self.budget_s,
            "timeout_s": self.timeout_s,
            "digests": dict(self.digests),
            "suites": {
                suite.name: {
                    "title": suite.title,
                    "impls": list(suite.impls),
                    "axes": list(suite.axes),
                    "cases": [case.to_dict() for case in suite.cases],
                }
                for suite in whole
            },
            "shards": [
                {suite.name: [places[suite.name, case] for case in suite.cases] for suite in shard}
                for shard in self.shards
            ],
        }


def load(folder: Path) -> Sweep:
    """The sweep in `folder`. Raises SlurmError where there is none."""
    plan = read_plan(folder)
    suites = {
        name: Suite(
            name, values["title"], tuple(values["impls"]), tuple(map(from_dict, values["cases"])), tuple(values["axes"])
        )
        for name, values in plan["suites"].items()
    }
    shards = tuple(
        tuple(
            replace(suites[name], cases=tuple(suites[name].cases[place] for place in places))
            for name, places in shard.items()
        )
        for shard in plan["shards"]
    )
    asked = tuple(plan["impls"]), plan["budget_s"], plan["timeout_s"], plan.get("digests", {})
    return Sweep(folder, plan["name"], shards, *asked)


def _join(shards: Sequence[Sequence[Suite]]) -> list[Suite]:
    suites: dict[str, Suite] = {}
    for suite in (suite for shard in shards for suite in shard):
        before = suites[suite.name].cases if suite.name in suites else ()
        suites[suite.name] = replace(suite, cases=before + suite.cases)
    return [suites[name] for name in sorted(suites)]


def open_sweep(
    out: Path,
    resume: bool,
    suites: Sequence[Suite],
    impls: Sequence[str],
    infos: Mapping[str, ImplInfo],
    options: Options,
    budget_s: float,
    timeout_s: float,
) -> Sweep:
    """The sweep whose merged results go to `out`: split again, or with `resume` the one in the folder beside it.

    Raises SlurmError for a sweep that is there without `resume`, or that was started with other suites or options.
    """
    folder = out.with_suffix(".tasks").absolute()
    require_one_meaning_of_threads(suites)
    if resume and (folder / "plan.json").exists():
        sweep = load(folder)
        asked = [(tuple(impls), budget_s, timeout_s), {(s.name, s.impls, case) for s in suites for case in s.cases}]
        begun = [
            (sweep.impls, sweep.budget_s, sweep.timeout_s),
            {(s.name, s.impls, case) for shard in sweep.shards for s in shard for case in s.cases},
        ]
        if asked != begun:
            raise SlurmError(f"{folder} was started with other suites or options: repeat those, or give another --out")
        if changed := sorted(path for path, digest in sweep.digests.items() if infos[path].digest != digest):
            raise SlurmError(
                f"{', '.join(changed)} changed since the sweep in {folder} began, and its rows are of what was there "
                "then: give another --out"
            )
        if sweep.missing():
            _require_same_software(sweep)
        return sweep
    if folder.exists() and not resume:
        raise SlurmError(
            f"{folder} already exists: pass --resume to continue its sweep, or another --out to start a new one"
        )
    if out.exists():
        raise SlurmError(f"{out} already exists and was not written by --slurm: give another --out")
    count = options.tasks or task_count(suites, impls, infos)
    shards = tuple(shard for shard in cut(suites, count, impls, infos) if shard)
    name = f"sasa-bench-{suites[0].name}-{uuid.uuid4().hex[:8]}"
    digests = {spec: info.digest for spec, info in infos.items() if info.digest}
    sweep = Sweep(folder, name, shards, tuple(impls), budget_s, timeout_s, digests)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "plan.json", sweep.to_dict())
    return sweep


def _require_same_software(sweep: Sweep) -> None:
    """Raise ResultsError where tasks were measured by other code or libraries than the rest would be."""
    here = detect()
    for path in (sweep.file(index) for index in range(len(sweep.shards))):
        if count_rows(path):
            require_same_software(path, read([path]).used_machines(), here)


def task_count(suites: Sequence[Suite], impls: Sequence[str], infos: Mapping[str, ImplInfo]) -> int:
    """How many tasks of TASK_S expected seconds the suites make."""
    seconds = sum(
        expected_s(case, [infos[impl].op for impl in impls or suite.impls]) for suite in suites for case in suite.cases
    )
    return max(1, min(MOST_TASKS, math.ceil(seconds / TASK_S)))


EveryCore = frozenset[tuple[str, Case]]
"""(suite, case) of cases that ask for every core: their rows have the number that a node had."""


def _of_every_core(suites: Sequence[Suite]) -> EveryCore:
    return frozenset((suite.name, case) for suite in suites for case in suite.cases if not case.threads)


def _place(row: Record, every_core: EveryCore) -> tuple[str, str, Case]:
    """What a task measures once, on whatever node."""
    anywhere = row.case.with_(threads=0)
    return row.suite, row.impl, anywhere if (row.suite, anywhere) in every_core else row.case


def count_rows(path: Path, rounds: int = 1, every_core: EveryCore = frozenset()) -> Fraction:
    """Rows in a results file that may still be growing or is not there yet; of those that fewer than `rounds` workers
    have measured the share that they have.
    """
    try:
        return _count_rows(path, path.stat().st_size, rounds, every_core)
    except FileNotFoundError:
        return Fraction(0)


@functools.lru_cache(maxsize=4 * MOST_TASKS)
def _count_rows(path: Path, size: int, rounds: int, every_core: EveryCore) -> Fraction:
    lines = path.read_bytes()[:size].splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    rows = [Record.from_dict(values) for values in found if values.pop("kind") == "row"]
    last = {_place(row, every_core): row for row in rows}.values()
    shares = [Fraction(len(row.worker_samples), rounds) if cut_short(row, rounds) else Fraction(1) for row in last]
    return sum(shares, Fraction(0))


@dataclass(frozen=True)
class Measure:
    """The work of one task: measure what the results file of shard `index` lacks."""

    folder: Path

    def __call__(self, index: int) -> None:
        """Runs on a node, as often as need be. Waits while another process still measures the same shard."""
        sweep = load(self.folder)
        path = sweep.file(index)
        with locked(path):
            cut_off_unfinished_case(path, {s.name: len(sweep.impls or s.impls) for s in sweep.shards[index]})
            if sweep.done(index) < sweep.size(index):
                _measure_rest(sweep, index)

    def checkpoint(self, index: int) -> Any:
        """Called before a time limit or pre-emption; the file is the state, so the requeued task starts as this one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, index)


def _measure_rest(sweep: Sweep, index: int) -> None:
    from sasa_bench.sweep.run import run
    from sasa_bench.timing.settings import Settings

    path, suites = sweep.file(index), sweep.shards[index]
    known, here = _as_of_here(read([path]), suites) if path.stat().st_size else None, detect()
    if known:
        require_same_software(path, known.used_machines(), here)
    run(
        suites,
        sweep.impls,
        path,
        known=known,
        machine=here,
        settings=Settings(budget_s=sweep.budget_s),
        timeout_s=sweep.timeout_s,
        locked=True,
    )


def _last_only(results: Results, suites: Sequence[Suite]) -> Results:
    """Without the rows of cases that a task began on one node and measured again on another one."""
    every_core = _of_every_core(suites)
    last: dict[tuple[str, str, Case], Record] = {}
    gone = []
    for row in results.rows:
        place = _place(row, every_core)
        if place in last:
            gone.append(last[place])
        last[place] = row
    results.drop(gone)
    return results


def _as_of_here(known: Results, suites: Sequence[Suite]) -> Results:
    """A case that asks for every core and was measured on a node with another number of them counts as measured."""
    every_core = _of_every_core(suites)
    rows = [
        row if _place(row, every_core)[2] == row.case else replace(row, case=row.case.with_(threads=available_cores()))
        for row in known.rows
    ]
    return replace(known, rows=rows)


def cut_off_unfinished_case(path: Path, sizes: Mapping[str, int]) -> None:
    """Remove the rows of a last case that was being written when its task died: they would be rounds without a rival.

    `sizes` gives the rows of a case by suite.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    last = len(lines)
    rows: list[dict[str, Any]] = []
    for line in reversed(lines):
        row = json.loads(line)
        if row["kind"] != "row" or (rows and (row["suite"], row["case"]) != (rows[0]["suite"], rows[0]["case"])):
            break
        rows.append(row)
    if rows and len(rows) < sizes[rows[0]["suite"]]:
        last -= len(rows)
    os.truncate(path, sum(map(len, lines[:last])))
