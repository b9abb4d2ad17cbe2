"""Past results files as a history: each case and implementation over commits, and where its level changed.

Change points are those of a rank cost (ruptures), each judged by the exact null distribution of the largest
Kruskal-Wallis statistic over all splits, so that having searched for the best split is paid for. The false discovery
rate over all series is held at the stated level (Benjamini and Hochberg 1995).
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from sasa_bench.case import Case, UserError
from sasa_bench.report import chart, page
from sasa_bench.report.figures import style
from sasa_bench.report.findings import Ratio, ratio
from sasa_bench.report.table import BASELINE
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.format import seconds
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo, Record
from sasa_bench.results.statistics import interval_of_median

FORMATS = ("text", "markdown", "csv")
LEVEL = 0.01
DRAWS = 60_000
"""Random orders behind a null distribution: the smallest p-value is one over as many."""
NEIGHBOURS = 0.05
"""Of two changes found together, each must show by itself at this level (Mann-Whitney)."""
RATIO, TIME = f"time / {BASELINE}", "time"
MOST_CHARTS = 60
"""How many changed series get a chart of their own."""


class HistoryError(UserError):
    """A history that cannot be made; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one machine and revision left in one file: one point of every series that it has rows for.

    committed: seconds since 1970 of the commit, where the repository knows it; started_at: of its first row.
    """

    file: Path
    machine: Machine
    started_at: str
    committed: int | None

    @property
    def words(self) -> str:
        """Commit and day, for people."""
        return f"{self.machine.revision} ({self.started_at[:10]})"


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


@dataclass(frozen=True)
class Change:
    """The level of `series` differs from result `index` on.

    before, after: medians of the results between this change and its neighbours. p_value: adjusted over all series.
    """

    series: Series
    index: int
    before: float
    after: float
    p_value: float

    @property
    def ratio(self) -> float:
        """Level after over level before."""
        return self.after / self.before

    @property
    def also_changed(self) -> str:
        """What else than the revision differs between the two runs beside the change: libraries, Python, system."""
        first, second = (self.series.runs[i].machine for i in (self.index - 1, self.index))
        before, after = _software(first), _software(second)
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return ", ".join(f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in names)


@dataclass(frozen=True)
class History:
    """All series with enough results, the changes among them, and sentences about what was left out."""

    series: list[Series]
    changes: list[Change]
    short: list[Series]
    runs: dict[str, list[Run]]
    impls: dict[str, ImplInfo]
    level: float
    order: str
    warnings: list[str]

    @property
    def verdict(self) -> str:
        """The first sentence of every form."""
        if not self.series:
            return f"No series has the {least_results(self.level)} results that a change point needs."
        if not self.changes:
            return f"No change in {len(self.series)} series at a false discovery rate of {100 * self.level:g} %."
        changed = len({change.series for change in self.changes})
        found = f"{len(self.changes)} change{'s' * (len(self.changes) != 1)}"
        return f"{found} in {changed} of {len(self.series)} series at a false discovery rate of {100 * self.level:g} %."

    def sentences(self) -> list[str]:
        """The verdict, and what stands behind it."""
        said = [self.verdict]
        for hardware, runs in self.runs.items():
            said.append(f"{hardware}: {len(runs)} runs, {runs[0].words} to {runs[-1].words}, in order {self.order}.")
        if self.short:
            least = least_results(self.level)
            most = max(len(series.values) for series in self.short)
            said.append(
                f"{len(self.short)} series have fewer than the {least} results that a change point needs at "
                f"{100 * self.level:g} % (the longest has {most}) and were not judged."
            )
        return said


def load(
    folder: Path, impls: Sequence[str] = (), held: Mapping[str, Sequence[Any]] | None = None, level: float = LEVEL
) -> History:
    """The history in every *.jsonl below `folder`, of these implementations and of cases with these values of axes.

    A file that is no results file is left out with a warning. Raises HistoryError where nothing is left to show.
    """
    points, infos, warnings = _collect(folder)
    wanted = [
        (record, run)
        for record, run in points
        if (not impls or record.impl in {*impls, BASELINE})
        and all(getattr(record.case, axis) in values for axis, values in (held or {}).items())
    ]
    dated = all(run.committed is not None for _, run in wanted)
    order = "by date of commit" if dated else "by when they were measured: the repository does not know every commit"
    found = [s for s in _series(wanted, warnings, dated) if not impls or s.impl in impls]
    if not found:
        known = ", ".join(sorted({record.impl for record, _ in points})) or "none"
        raise HistoryError(
            f"{folder} holds no row that is ok for what was asked; implementations with results: {known}"
            + "".join(f"; {warning}" for warning in warnings[:3])
        )
    least = least_results(level)
    long = [s for s in found if len(s.values) >= least]
    located = change_points([s.values for s in long], level)
    changes = [
        Change(series, index, before, after, p)
        for series, places in zip(long, located, strict=True)
        for index, before, after, p in _levels(series.values, places)
    ]
    changes.sort(key=lambda change: -abs(math.log(change.ratio)))
    runs = {
        hardware: sorted({run for s in found if s.hardware == hardware for run in s.runs}, key=_by_date(dated))
        for hardware in dict.fromkeys(s.hardware for s in found)
    }
    short = [s for s in found if len(s.values) < least]
    return History(long, changes, short, runs, infos, level, order, warnings)


def change_points(series: Sequence[Sequence[float]], level: float = LEVEL) -> list[dict[int, float]]:
    """For each series, index of the first value after a change -> its p-value, adjusted over all series.

    Every series is split at its best place or two; what holds after Benjamini and Hochberg makes parts, which are
    split in the next round. Where nothing changed in any series, a change is found with probability `level` at most,
    however the values scatter, as long as their order is random. Raises HistoryError without ruptures.
    """
    found: list[dict[int, float]] = [{} for _ in series]
    least = least_results(level)
    parts = [(i, 0, len(values)) for i, values in enumerate(series)]
    while parts := [part for part in parts if part[2] - part[1] >= least]:
        splits = [best_split(series[i][first:last], level) for i, first, last in parts]
        adjusted = stats.false_discovery_control([p for _, p in splits])
        following = []
        for (i, first, last), (places, _), p in zip(parts, splits, adjusted, strict=True):
            if p <= level:
                found[i] |= {first + place: float(p) for place in places}
                following += [(i, a, b) for a, b in pairwise([first, *(first + place for place in places), last])]
        parts = following
    return found


def best_split(values: Sequence[float], level: float = LEVEL) -> tuple[list[int], float]:
    """(indices of the first values after the most likely changes, one or two; p-value of there being any).

    A lasting change splits the values in two, one that was mended in three. Either p-value is that of the largest
    Kruskal-Wallis statistic over all such splits under random order, and counts twice (Bonferroni). Two changes are
    told only where one is not significant, and of them those beside which the parts differ by themselves.
    """
    try:
        import ruptures
    except ModuleNotFoundError:
        raise HistoryError("change points need ruptures: pip install 'sasa-bench[history]'") from None
    search = ruptures.Dynp(model="rank", min_size=1, jump=1).fit(np.asarray(values))
    ranks, found = stats.rankdata(values), []
    for cuts in (1, 2):
        places = [int(place) for place in search.predict(n_bkps=cuts)[:-1]]
        statistic = stats.kruskal(*np.split(ranks, places)).statistic if np.ptp(ranks) else 0.0
        null = _null(len(values), cuts)
        exceeding = len(null) - np.searchsorted(null, statistic - 1e-9)
        found.append((min(1.0, 2 * float((exceeding + 1) / (len(null) + 1))), places))
    if found[0][0] <= max(level, found[1][0]):
        return found[0][1], found[0][0]
    p, places = found[1]
    parts = np.split(ranks, places)
    real = [i for i, (a, b) in enumerate(pairwise(parts)) if stats.mannwhitneyu(a, b).pvalue <= NEIGHBOURS]
    return ([places[i] for i in real], p) if real else (found[0][1], found[0][0])


def least_results(level: float = LEVEL) -> int:
    """The fewest results in which a lasting change can be found.

    Of all ways to choose the later half, two are as extreme; best_split doubles that, for it looks for two kinds.
    """
    count = 2
    while 4 / math.comb(count, count // 2) > level:
        count += 2
    return count


@lru_cache(maxsize=512)
def _null(count: int, cuts: int) -> np.ndarray:
    """The largest statistic over all splits of `count` values in random order, sorted; the same in every process."""
    rng = np.random.default_rng([count, cuts])
    ranks = np.tile(np.arange(1.0, count + 1), (DRAWS // 20, 1))
    drawn = [_largest(rng.permuted(ranks, axis=1), cuts) for _ in range(20)]
    return np.sort(np.concatenate(drawn))


def _largest(ranks: np.ndarray, cuts: int) -> np.ndarray:
    """The largest Kruskal-Wallis statistic over all splits in `cuts` + 1 parts; ranks [N, n] -> [N]."""
    n = ranks.shape[1]
    sums = np.cumsum(ranks, axis=1).T  # [n, N]
    place = np.arange(1.0, n + 1)[:, None]
    if cuts == 1:
        squares = (sums[:-1] ** 2 / place[:-1] + (sums[-1] - sums[:-1]) ** 2 / (n - place[:-1])).max(axis=0)
    else:
        squares = np.zeros(len(ranks))
        last = (sums[-1] - sums[:-1]) ** 2 / (n - place[:-1])
        for i in range(n - 2):
            middle = (sums[i + 1 : -1] - sums[i]) ** 2 / (place[i + 1 : -1] - place[i])
            squares = np.maximum(squares, sums[i] ** 2 / (i + 1) + (middle + last[i + 1 :]).max(axis=0))
    return 12 / (n * (n + 1)) * squares - 3 * (n + 1)


def _levels(values: Sequence[float], places: Mapping[int, float]) -> list[tuple[int, float, float, float]]:
    """(index, median before, median after, p-value) of each change; each level reaches to the next change."""
    cuts = [0, *sorted(places), len(values)]
    medians = [statistics.median(values[a:b]) for a, b in pairwise(cuts)]
    return [(cut, medians[i], medians[i + 1], places[cut]) for i, cut in enumerate(cuts[1:-1])]


def _collect(folder: Path) -> tuple[list[tuple[Record, Run]], dict[str, ImplInfo], list[str]]:
    """Each ok row with its run, implementations, warnings. A row that several files hold counts once."""
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise HistoryError(f"{folder} holds no results file (*.jsonl): `sasa-bench run … --out {folder}/NAME.jsonl`")
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
            commit = results.machines[key].commit
            if commit not in dates:
                dates[commit] = _committed(commit, folder)
        runs = {key: Run(file, results.machines[key], start, dates[results.machines[key].commit])
                for key, start in starts.items()}  # fmt: skip
        points += [(record, runs[record.machine]) for record in rows.values()]
    return points, infos, warnings


def _committed(commit: str, folder: Path) -> int | None:
    for where in (folder, Path()):
        command = ["git", "-C", str(where), "show", "--no-patch", "--format=%ct", "--end-of-options", commit]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            return int(said.split()[0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
    return None


def _series(points: Sequence[tuple[Record, Run]], warnings: list[str], dated: bool) -> list[Series]:
    baselines = {(r.suite, r.case, id(run)): r for r, run in points if r.impl == BASELINE}
    grouped: dict[tuple[str, str, str, Case], list[tuple[Record, Run]]] = {}
    for record, run in points:
        grouped.setdefault((run.machine.hardware_id, record.suite, record.impl, record.case), []).append((record, run))
    by_date = _by_date(dated)
    found = []
    lost = 0
    for (hardware, suite, impl, case), members in grouped.items():
        members.sort(key=lambda member: by_date(member[1]))
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
    return Ratio(statistics.median(record.samples_s), low, high)


def _by_date(dated: bool) -> Callable[[Run], tuple[int, str, str]]:
    return lambda run: ((run.committed or 0) if dated else 0, run.started_at, str(run.file))


def _software(machine: Machine) -> dict[str, str]:
    return (
        machine.libraries
        | machine.environment
        | {"Python": machine.python, "system": machine.os, "driver": machine.driver}
    )


def rows(history: History) -> pd.DataFrame:
    """The changes, the largest first, as a table in base units."""
    columns = ("machine", "suite", "impl", "case", "quantity", "results", "commit_before", "commit_after", "started_at")
    table = [
        (
            *(c.series.hardware, c.series.suite, c.series.impl, c.series.words, c.series.quantity),
            len(c.series.values),
            *(c.series.runs[i].machine.revision for i in (c.index - 1, c.index)),
            c.series.runs[c.index].started_at,
            *(c.before, c.after, c.ratio, c.p_value, c.also_changed),
        )
        for c in history.changes
    ]
    return pd.DataFrame(table, columns=[*columns, "before", "after", "ratio", "p_value", "also_changed"])


def render(history: History, form: str) -> str:
    """Sentences and the table of changes as text or markdown; the table alone, in base units, as csv.

    Raises HistoryError for an unknown form.
    """
    if form not in FORMATS:
        raise HistoryError(f"unknown format {form!r}: there are {', '.join(FORMATS)}")
    if form == "csv":
        return rows(history).to_csv(index=False)
    shown = _shown(history)
    lines = [f"- {line}" if form == "markdown" else line for line in history.sentences()]
    if shown:
        look = "github" if form == "markdown" else "simple"
        lines += ["", tabulate(shown, headers="keys", tablefmt=look, disable_numparse=True)]
    return "\n".join(lines) + "\n"


def _shown(history: History) -> list[dict[str, str]]:
    machines = len(history.runs) > 1
    return [
        ({"machine": c.series.hardware} if machines else {})
        | {
            "suite": c.series.suite,
            "implementation": c.series.impl,
            "case": c.series.words,
            "commit before": c.series.runs[c.index - 1].words,
            "after": c.series.runs[c.index].words,
            "level": f"{c.series.quantity} {c.series.format(c.before)} -> {c.series.format(c.after)}",
            "ratio": f"{c.ratio:.3f}",
            "p": f"{c.p_value:.1g}",
            "also changed": c.also_changed,
        }
        for c in history.changes
    ]


def html(history: History) -> str:
    """The history as one page that opens offline: what changed first, then every series by machine and suite."""
    data = _points(history)
    styles = style(history.impls, sorted(set(data["impl"])))
    changed = list(dict.fromkeys(change.series for change in history.changes))
    charts = [
        {
            "title": f"{series.impl}, {series.suite}: {series.words}",
            "machine": series.hardware,
            "changes": [_said(c) for c in history.changes if c.series == series],
            "chart": chart.levels(*_one(history, series), series.quantity, styles[series.impl]),
        }
        for series in changed[:MOST_CHARTS]
    ]
    sections = [
        {"machine": hardware, "suite": suite, "chart": chart.over_runs(points, styles)}
        for (hardware, suite), points in data.groupby(["machine", "suite"], sort=False)
    ]
    table = rows(history)
    return page.render(
        "history.html",
        sentences=history.sentences(),
        warnings=history.warnings,
        level=history.level,
        changed=charts,
        more=len(changed) - len(charts),
        sections=sections,
        machines=len(history.runs),
        table=page.sortable(_digits(table), "changes", ["machine", "suite", "impl", "quantity"]) if len(table) else "",
        downloads=page.downloads(data.drop(columns=["place"]), "history"),
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def _said(change: Change) -> str:
    series = change.series
    beside = f"; also changed: {change.also_changed}" if change.also_changed else ""
    return (
        f"{series.runs[change.index - 1].words} -> {series.runs[change.index].words}: {series.quantity} "
        f"{series.format(change.before)} -> {series.format(change.after)}, {change.ratio:.3f} times "
        f"(p {change.p_value:.1g}){beside}"
    )


def _digits(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{name: [float(f"{v:.4g}") for v in table[name]] for name in ("before", "after", "ratio")})


def _points(history: History) -> pd.DataFrame:
    """Every result of every series in a row; `place` is the turn of its run among those of the machine."""
    places = {hardware: {id(run): i for i, run in enumerate(runs)} for hardware, runs in history.runs.items()}
    table = [
        {
            "machine": series.hardware,
            "suite": series.suite,
            "impl": series.impl,
            "case": series.words,
            "quantity": series.quantity,
            "place": float(places[series.hardware][id(run)]),
            "commit": run.machine.revision,
            "started_at": run.started_at,
            "value": value,
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
        }
        for series in [*history.series, *history.short]
        for run, value, (low, high) in zip(series.runs, series.values, series.bounds, strict=True)
    ]
    frame = pd.DataFrame(table)
    return frame.astype({"low": "float64", "high": "float64"})


def _one(history: History, series: Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The results of one series, and the levels between its changes."""
    found = sorted((c for c in history.changes if c.series == series), key=lambda c: c.index)
    cuts = [0, *(c.index for c in found), len(series.values)]
    points = pd.DataFrame(
        {
            "place": np.arange(len(series.values), dtype=float),
            "commit": [run.machine.revision for run in series.runs],
            "started_at": [run.started_at[:16].replace("T", " ") for run in series.runs],
            "value": series.values,
            "low": [low if math.isfinite(low) else np.nan for low, _ in series.bounds],
            "high": [high if math.isfinite(high) else np.nan for _, high in series.bounds],
        }
    )
    spans = pd.DataFrame(
        {
            "first": [a - 0.5 for a in cuts[:-1]],
            "last": [b - 0.5 for b in cuts[1:]],
            "level": [statistics.median(series.values[a:b]) for a, b in pairwise(cuts)],
            "words": ["", *(f"{c.series.runs[c.index].machine.revision}: ×{c.ratio:.3f}" for c in found)],
        }
    )
    return points, spans
