"""A history as text, Markdown, CSV and a page."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import numpy as np
import pandas as pd
from tabulate import tabulate

from sasa_bench.report import page
from sasa_bench.report.charts.over_time import levels, over_runs
from sasa_bench.report.history.history import Change, History
from sasa_bench.report.history.series import HistoryError, Series
from sasa_bench.report.styles import style
from sasa_bench.report.table import one_cell, without_formulas
from sasa_bench.results.fields import printable

FORMATS = ("text", "markdown", "csv")
MOST_CHARTS = 60
"""How many changed series get a chart of their own."""


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
        return rows(history).apply(without_formulas).to_csv(index=False)
    shown = _shown(history)
    lines = [f"- {line}" if form == "markdown" else line for line in map(printable, history.sentences())]
    shown = [{name: one_cell(cell, form) for name, cell in row.items()} for row in shown]
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
            "chart": levels(*_one(history, series), series.quantity, styles[series.impl]),
        }
        for series in changed[:MOST_CHARTS]
    ]
    sections = [
        {"machine": hardware, "suite": suite, "chart": over_runs(points, styles)}
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
