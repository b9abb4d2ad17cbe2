"""Results files as series: each case and implementation over runs, oldest first."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_bench.case import Case, UserError
from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.findings import Ratio, ratio
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.format import seconds
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record
from sasa_bench.results.revision import git_environment
from sasa_bench.results.statistics import interval_of_median

RATIO, TIME = f"time / {BASELINE}", "time"


class HistoryError(UserError):
    """A history that cannot be made; the message states why and what to do."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one machine and revision left in one file: one point of every series that it has rows for.

    committed: seconds since 1970 of the commit, the later one of sasa-bench and of kernel files, where the repositories
    know both; started_at: of its first row; kernel: the commits of kernel files.
    """

    file: Path
    machine: Machine
    started_at: str
    committed: int | None
    kernel: str = ""

    @property
    def words(self) -> str:
        """Commit and day, for people."""
        kernel = f", kernel {self.kernel}" if self.kernel else ""
        return f"{self.machine.revision}{kernel} ({self.started_at[:10]})"


@dataclass(frozen=True, eq=False)
class Series:
    """One case x implementation on one kind of hardware, oldest result first.

    quantity: RATIO, to the baseline of the same run, or TIME, in seconds. bounds: the 95 % interval of each value,
    infinite where a result has too few samples.
    """

    hardware: str
    suite: str
    impl: str
    case: Case
    quantity: str
    runs: tuple[Run, ...]
    values: tuple[float, ...]
    bounds: tuple[tuple[float, float], ...]

    @property
    def words(self) -> str:
        """The case as `name=value` words."""
        return self.case.describe({"threads": self.runs[0].machine.cores})

    def format(self, value: float) -> str:
        """A value of this series for people."""
        return seconds(value) if self.quantity == TIME else f"{value:.3g}"


def collect(
    places: Sequence[Path], repository: Path | None = None
) -> tuple[list[tuple[Record, Run]], dict[str, ImplInfo], list[str]]:
    """Each ok row with its run, implementations, warnings. A row that several files hold counts once.

    `places` are results files, and folders with results files below them; `repository` is asked, besides the one of
    sasa-bench, when a commit was made.
    """
    files = sorted({file for place in places for file in (place.rglob("*.jsonl") if place.is_dir() else [place])})
    if not files:
        named = ", ".join(map(str, places))
        raise HistoryError(
            f"{named} holds no results file (*.jsonl): `sasa-bench run … --out {places[0]}/NAME.jsonl` writes one"
        )
    points: list[tuple[Record, Run]] = []
    infos: dict[str, ImplInfo] = {}
    warnings: list[str] = []
    dates: dict[str, int | None] = {}
    seen: set[tuple[Any, ...]] = set()
    for file in files:
        try:
            results = read([file])
        except ResultsError as error:
            warnings.append(f"left out: {error}")
            continue
        warnings += results.warnings
        infos = results.impls | infos
        starts: dict[str, str] = {}
        rows: dict[tuple[Any, ...], Record] = {}
        for record in results.rows:
            identity = (*record.key, record.machine, record.started_at, record.samples_s)
            if record.status == "ok" and record.samples_s and identity not in seen:
                seen.add(identity)
                rows[(*record.key, record.machine)] = record
                starts[record.machine] = min(record.started_at, starts.get(record.machine, record.started_at))
        for key in starts:
            if key not in results.machines:
                raise HistoryError(f"{file} does not describe the machine {key} of its rows: measure it again")
        runs = {}
        for key, start in starts.items():
            own = {str(row.extra.get("source_commit", "")) for row in rows.values() if row.machine == key} - {""}
            kernel = ", ".join(sorted(own))
            commits = {results.machines[key].commit, *(commit.removesuffix("+dirty") for commit in own)}
            for commit in commits - dates.keys():
                dates[commit] = _committed(commit, repository)
            known = [date for commit in commits if (date := dates[commit]) is not None]
            committed = max(known) if len(known) == len(commits) else None
            runs[key] = Run(file, results.machines[key], start, committed, kernel)
        points += [(record, runs[record.machine]) for record in rows.values()]
    return points, infos, warnings


def _committed(commit: str, repository: Path | None) -> int | None:
    # Results may come from anywhere, and git runs programs that the settings of a repository name: only the code that
    # is running and what the user named are trusted.
    for where in (repository, Path(__file__).parent):
        if where is None:
            continue
        command = [
            "git",
            "-C",
            str(where),
            "-c",
            "log.showSignature=false",
            "show",
            "--no-patch",
            "--format=%ct",
            "--end-of-options",
            commit,
        ]
        try:
            said = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=30, check=True, env=git_environment()
            ).stdout
            return int(said.split()[0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
    return None


def gather_series(points: Sequence[tuple[Record, Run]], warnings: list[str], dated: bool) -> list[Series]:
    baselines = {(r.suite, r.case, id(run)): r for r, run in points if r.impl == BASELINE}
    grouped: dict[tuple[str, str, str, Case], list[tuple[Record, Run]]] = {}
    for record, run in points:
        grouped.setdefault((run.machine.hardware_id, record.suite, record.impl, record.case), []).append((record, run))
    key = date_key(dated)
    found = []
    lost = 0
    for (hardware, suite, impl, case), members in grouped.items():
        members.sort(key=lambda member: key(member[1]))
        with_baseline = [m for m in members if (suite, case, id(m[1])) in baselines]
        as_ratio = impl != BASELINE and 2 * len(with_baseline) > len(members)
        if as_ratio:
            lost += len(members) - len(with_baseline)
            members = with_baseline
            measured = [ratio(record, baselines[suite, case, id(run)]) for record, run in members]
        else:
            measured = [_time(record) for record, _ in members]
        found.append(
            Series(
                hardware,
                suite,
                impl,
                case,
                RATIO if as_ratio else TIME,
                tuple(run for _, run in members),
                tuple(m.value for m in measured),
                tuple((m.low, m.high) for m in measured),
            )
        )
    if lost:
        warnings.append(f"{lost} rows without an ok {BASELINE} beside them were left out of series of ratios")
    return found


def _time(record: Record) -> Ratio:
    low, high = interval_of_median(record.samples_s)
    return Ratio(record.median_s, low, high)


def date_key(dated: bool) -> Callable[[Run], tuple[int, str, str]]:
    return lambda run: ((run.committed or 0) if dated else 0, run.started_at, str(run.file))
