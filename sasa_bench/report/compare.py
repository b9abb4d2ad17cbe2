"""Results files side by side: time over time on the same hardware, ratios to the baseline across unlike hardware."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasa_bench.case import AXES, Case
from sasa_bench.report import page
from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.charts.compared import against_each_other, changes
from sasa_bench.report.charts.parts import RUN
from sasa_bench.report.charts.sweep import sweep
from sasa_bench.report.findings import Ratio, answers, ratio, tally, times
from sasa_bench.report.styles import style
from sasa_bench.report.table import frame, marked, varying_axes
from sasa_bench.results.columns import COLUMNS, TIME
from sasa_bench.results.file import ResultsError, read, require_described
from sasa_bench.results.record import ImplInfo, Record, Results

MOST_ROWS = 5
"""How many of the largest changes are described in sentences."""


@dataclass(frozen=True)
class Run:
    """One results file: its label on the page, what is in it, and its tidy table."""

    label: str
    results: Results
    table: pd.DataFrame

    @property
    def letter(self) -> str:
        """The begin of the label: A, B, …, Z, AA, AB, …"""
        return self.label.partition(":")[0]

    @property
    def hardware(self) -> str:
        """The id of the hardware."""
        return next(iter(self.results.hardware()), "unknown")


@dataclass(frozen=True)
class Pair:
    """Row `a` of the first run and row `b` of the second for one implementation and case."""

    a: Record
    b: Record

    @property
    def ratio(self) -> Ratio:
        """Time of b over time of a."""
        return ratio(self.b, self.a)


def load(paths: Sequence[Path]) -> list[Run]:
    """A run for each file, labelled A, B, … Raises ResultsError for fewer than two files or one of several machines."""
    if len(paths) < 2:
        raise ResultsError("--compare needs two results files or more")
    runs = []
    for number, path in enumerate(paths):
        results = read([path])
        if not results.rows:
            raise ResultsError(f"{path} has no rows to compare")
        if len(results.hardware()) > 1:
            raise ResultsError(f"{path} holds rows of unlike machines: give a file for each machine")
        require_described(results)
        runs.append(Run(f"{_letters(number)}: {path.stem}", results, frame(results)))
    return runs


def _letters(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA, as the columns of a spreadsheet."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def html(runs: Sequence[Run]) -> str:
    """The comparison as one page that opens offline; each run is set against the first."""
    impls: dict[str, ImplInfo] = {}
    for run in runs:
        impls |= {name: info for name, info in run.results.impls.items() if name not in impls}
    table = pd.concat([run.table.assign(**{RUN: run.label}) for run in runs], ignore_index=True)
    charted = marked(table)
    styles = style(impls, sorted({*table["impl"], *charted["impl"]}))
    first = runs[0]
    sections: list[dict[str, Any]] = []
    for other in runs[1:]:
        alike = first.hardware == other.hardware
        pairs = list(_pairs(first, other, alike))
        shown = _versions(pairs, first, other) if alike else _within(pairs, first, other)
        spec = changes(shown, styles) if alike else against_each_other(shown, styles)
        sections.append(
            {
                "title": f"{other.label} next to {first.label}",
                "alike": alike,
                "sentences": list(_said(pairs, first, other) if alike else _said_within(shown, first, other)),
                "chart": spec,
                "table": page.sortable(shown, f"pairs-{len(sections)}", _words(shown)) if len(shown) else "",
                "shared": len(pairs),
                "lost": list(_status_changes(first, other, alike)),
            }
        )
    machines = {run.label: _machine(run) for run in runs}
    return page.render(
        "compare.html",
        runs=[{"label": run.label, "answers": answers(run.results, run.table)} for run in runs],
        machines=machines,
        differing=[key for key in next(iter(machines.values())) if len({m[key] for m in machines.values()}) > 1],
        sections=sections,
        suites=[{"name": s, "chart": sweep(rows, styles)} for s, rows in charted.groupby("suite", sort=False)],
        warnings=[warning for run in runs for warning in run.results.warnings],
        downloads=page.downloads(table, "compared"),
        chart_script=page.chart_script(),
        table_script=page.table_script(),
        baseline=BASELINE,
    )


def _machine(run: Run) -> dict[str, str]:
    return page.describe_all(run.results.used_machines())


def keyed(results: Results) -> dict[tuple[str, str, Case], Record]:
    """Rows by suite, implementation and case; those on every core of their machine also by the case with 0 threads,
    which is that of every core of another machine."""
    found = {}
    for row in results.rows:
        machine = results.machines.get(row.machine)
        if machine and row.case.threads == machine.cores:
            found[row.suite, row.impl, row.case.with_(threads=0)] = row
    return found | {row.key: row for row in results.rows}


def _matches(first: Run, other: Run, alike: bool) -> Iterator[tuple[Record, Record]]:
    """The rows of both runs for the same case: by its threads, on unlike machines also by every core of either."""
    mine, theirs = keyed(first.results), keyed(other.results)
    for (suite, impl, case), a in mine.items():
        if not case.threads:
            continue
        every = suite, impl, case.with_(threads=0)
        b = theirs.get((suite, impl, case))
        if b is None and not alike and mine.get(every) is a:
            b = theirs.get(every)
        if b is not None:
            yield a, b


def _pairs(first: Run, other: Run, alike: bool) -> Iterator[Pair]:
    return (Pair(a, b) for a, b in _matches(first, other, alike) if a.status == b.status == "ok")


def _case_columns(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = [
        {"suite": p.a.suite, "impl": p.a.impl} | p.a.case.to_dict() | {"resolution": str(p.a.case.resolution)}
        for p in pairs
    ]
    if not rows:
        return []
    axes = varying_axes(pd.DataFrame(rows))
    return [{COLUMNS[name].label: row[name] for name in ("suite", "impl", *axes)} for row in rows]


def _versions(pairs: Sequence[Pair], first: Run, other: Run) -> pd.DataFrame:
    """Same hardware: both times and their ratio with its interval."""
    rows = []
    unit, in_s = TIME.cell
    for pair, words in zip(pairs, _case_columns(pairs), strict=True):
        found = pair.ratio
        rows.append(
            words
            | {
                f"A, {unit}": _digits(pair.a.median_s / in_s),
                f"{other.letter}, {unit}": _digits(pair.b.median_s / in_s),
                "ratio": _digits(found.value),
                "low": _digits(found.low) if np.isfinite(found.high) else float("nan"),
                "high": _digits(found.high),
                "verdict": found.verdict,
            }
        )
    return pd.DataFrame(rows)


def _within(pairs: Sequence[Pair], first: Run, other: Run) -> pd.DataFrame:
    """Unlike hardware: each run's time over its own baseline."""
    base = {
        run.label: {
            (r.machine, r.suite, r.case): r for r in run.results.rows if r.impl == BASELINE and r.status == "ok"
        }
        for run in (first, other)
    }
    rows = []
    for pair, words in zip(pairs, _case_columns(pairs), strict=True):
        a, b = (base[run.label].get((r.machine, r.suite, r.case)) for run, r in ((first, pair.a), (other, pair.b)))
        if a and b and pair.a.impl != BASELINE:
            rows.append(words | {"A": _digits(ratio(pair.a, a).value), other.letter: _digits(ratio(pair.b, b).value)})
    return pd.DataFrame(rows)


def _digits(value: float) -> float:
    return float(f"{value:.4g}") if np.isfinite(value) else float("nan")


def _words(shown: pd.DataFrame) -> list[str]:
    labels = {"suite", COLUMNS["impl"].label, "verdict"} | {COLUMNS[axis].label for axis in AXES}
    return [name for name in shown.columns if name in labels]


def _words_of(record: Record, run: Run) -> str:
    """The case in words; its threads where they are not every core of the machine."""
    machine = run.results.machines.get(record.machine)
    return record.case.describe({"threads": machine.cores} if machine else {})


def _said(pairs: Sequence[Pair], first: Run, other: Run) -> Iterator[str]:
    if not pairs:
        yield "No implementation has an ok row for the same case in both files."
        return
    ratios = [pair.ratio for pair in pairs]
    words = ", ".join(f"{count} {verdict}" for verdict, count in tally(ratios))
    mean = float(np.exp(np.mean(np.log([r.value for r in ratios]))))
    yield (
        f"Same hardware. Of {len(ratios)} shared rows, in {other.letter}: {words}. "
        f"The geometric mean of the time ratios is {mean:.2f}."
    )
    decided = [(pair, r) for pair, r in zip(pairs, ratios, strict=True) if r.decided]
    decided.sort(key=lambda item: -abs(float(np.log(item[1].value))))
    for pair, found in decided[:MOST_ROWS]:
        yield f"`{pair.a.impl}` in {pair.a.suite} ({_words_of(pair.a, first)}): {found} times its time in A."
    if len(decided) > MOST_ROWS:
        yield f"{len(decided) - MOST_ROWS} smaller changes are in the table."
    yield "Machines drift between runs: a change of a few percent between two files is no evidence."


def _said_within(shown: pd.DataFrame, first: Run, other: Run) -> Iterator[str]:
    yield f"Different hardware: each time is divided by that of `{BASELINE}` on its own machine."
    if shown.empty:
        yield f"No case has `{BASELINE}` and another implementation ok in both files."
        return
    b = other.letter
    for impl, rows in shown.groupby(COLUMNS["impl"].label, sort=False):
        yield (
            f"`{impl}` takes {times(float(rows['A'].median()))} times as long as `{BASELINE}` in A and "
            f"{times(float(rows[b].median()))} times in {b} (medians of {len(rows)} shared cases)."
        )


def _status_changes(first: Run, other: Run, alike: bool) -> Iterator[dict[str, str]]:
    for a, b in _matches(first, other, alike):
        if a.status != b.status:
            yield {
                "row": f"{a.suite}, {a.impl}, {_words_of(a, first)}",
                "a": f"{a.status}: {a.reason}" if a.reason else a.status,
                "b": f"{b.status}: {b.reason}" if b.reason else b.status,
            }
