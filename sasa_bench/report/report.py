"""One self-contained HTML file from results: answers, charts, the table, what did not run, the method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sasa_bench.report import chart, formulations, page
from sasa_bench.report.figures import style
from sasa_bench.report.findings import ATTENTION, answers
from sasa_bench.report.table import footnotes, frame, marked, varying_axes
from sasa_bench.results.columns import COLUMNS, cells
from sasa_bench.results.file import ResultsError
from sasa_bench.results.format import seconds
from sasa_bench.results.record import Results

MOST_CASES = 3
"""How many cases stand beside a reason that many share."""


def html(results: Results, name: str = "results") -> str:
    """The report as one page that opens offline; `name` is that of the files that can be saved from it.

    Raises ResultsError for rows of unlike machines, and for a file without rows.
    """
    if not results.rows:
        raise ResultsError("no rows to report: the run stopped before its first case was done")
    hardware = results.hardware()
    if len(hardware) > 1:
        raise ResultsError(
            f"the rows come from unlike machines ({', '.join(hardware)}), and times of one do not compare with times "
            "of another: make a report for each, or give --compare to see them side by side"
        )
    table = frame(results)
    shown = marked(table)
    styles = style(results.impls, sorted(set(shown["impl"])))
    exported = formulations.pairs(results)
    suites = [{"name": suite, "chart": chart.sweep(rows, styles)} for suite, rows in shown.groupby("suite", sort=False)]
    return page.render(
        "report.html",
        machines=[page.describe(machine) for machine in hardware.values()],
        answers=answers(results, table),
        warnings=results.warnings,
        suites=suites,
        exported=_exported(exported) if exported else "",
        to_export=list(formulations.answers(exported)),
        roofline=chart.roofline(shown, list(results.roofs.values()), styles),
        impls=sorted((i for i in results.impls.values() if i.label in styles), key=lambda info: info.index),
        peers=peers(table, results),
        styles=styles,
        counts=table["status"].value_counts().to_dict(),
        table=rows_table(shown),
        downloads=page.downloads(table, name),
        footnotes=footnotes(table),
        failed=failures(shown),
        roofs=list(results.roofs.values()),
        cold="time_cold_s" in table,
        started=str(min(table["started_at"]))[:16].replace("T", " "),
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def write(results: Results, out: Path) -> None:
    """Write the report of `results` to `out`. Raises ResultsError as `html` does."""
    page.write(html(results, out.stem), out)


def rows_table(table: pd.DataFrame) -> str:
    """Every row, sortable and filterable; figures to four digits, the files to save have them in full."""
    words = ["suite", *varying_axes(table), "impl", "status"]
    shown = table[words].copy()
    shown.columns = pd.Index([COLUMNS[name].label for name in words])
    searched = list(shown.columns)
    for name, column in cells(table.columns).items():
        values = table[name].astype("float64")
        if values.notna().any():
            shown[column.heading] = [column.scaled(value) for value in values]
    if (table["reason"] != "").any():
        shown["reason"] = [reason if len(reason) <= 90 else reason[:89] + "…" for reason in table["reason"]]
    return page.sortable(shown, "rows", searched)


def peers(table: pd.DataFrame, results: Results) -> list[dict[str, str]]:
    """Who computes what at which cost: one entry for each implementation of attention; none where none differs.

    Times are over that of conv3x3 for the same case, the least and the largest over the ok rows of forward passes of
    layers; build is the median of the seconds that setting up took, compiling included.
    """
    if not (table["differs"] != "").any():
        return []
    found = []
    for info in sorted(results.impls.values(), key=lambda info: info.index):
        name = info.name
        if name not in set(table["impl"]) or not (info.op == ATTENTION or info.differs):
            continue
        rows = table[(table["impl"] == name) & (table["status"] == "ok")]
        ratios = rows[(rows["scope"] == "layer") & (rows["mode"] == "forward")]["time_vs_conv3x3"].dropna()
        builds = rows["build_s"].dropna() if "build_s" in rows else rows["time_median_s"][:0]
        failed = table[(table["impl"] == name) & (table["status"] != "ok")]
        found.append(
            {
                "name": info.label,
                "function": info.differs or "exact",
                "ratio": _ends(ratios),
                "build": seconds(float(builds.median())) if len(builds) else "",
                "ran": f"{len(rows)} of {len(rows) + len(failed)}",
            }
        )
    return found


def _ends(values: pd.Series) -> str:
    ends = list(dict.fromkeys(COLUMNS["time_vs_conv3x3"].text(value) for value in (values.min(), values.max())))
    return " to ".join(ends) if len(values) else ""


def _exported(found: Sequence[formulations.Pair]) -> str:
    shown, words = formulations.table(found)
    return page.sortable(shown, "exported", words)


def failures(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What has no time: one entry for each suite, implementation, status and reason, with its cases."""
    failed = table[table["status"] != "ok"]
    axes = varying_axes(table)
    found = []
    for keys, rows in failed.groupby(["suite", "impl", "status", "reason"], sort=False):
        cases = [
            ", ".join(f"{COLUMNS[axis].label} {row[axis]}" for axis in axes) or "its one case"
            for row in rows.head(MOST_CASES)[axes].to_dict("records")
        ]
        more = len(rows) - len(cases)
        cases += [f"and {more} more"] if more else []
        found.append(dict(zip(("suite", "impl", "status", "reason"), keys, strict=True)) | {"cases": "; ".join(cases)})
    return found
