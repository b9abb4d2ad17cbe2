"""The sections of the report. To add one: a function here that SECTIONS lists, and templates/sections/ANCHOR.html."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sasa_bench.report import page
from sasa_bench.report.charts.roofline import roofline as roofline_chart
from sasa_bench.report.charts.samples import distribution, over_time
from sasa_bench.report.charts.sweep import sweep
from sasa_bench.report.findings import ATTENTION, HOLDS, Answers, exports
from sasa_bench.report.findings.noise import noise
from sasa_bench.report.page import Section
from sasa_bench.report.samples import packed
from sasa_bench.report.styles import Style
from sasa_bench.report.table import above_roof, footnotes, reported_statuses, varying_axes
from sasa_bench.results.columns import COLUMNS, cells
from sasa_bench.results.format import seconds
from sasa_bench.results.record import Results

LEAST_FOLDED = 4
"""Claims about one network each that hold: as many as these are folded."""
MOST_CASES = 3
"""How many cases stand beside a reason that many share."""


@dataclass(frozen=True)
class Inputs:
    """What sections are made from.

    table   the tidy table of `results`; `shown` the same with marked names
    name    of the files that can be saved from the page
    """

    results: Results
    table: pd.DataFrame
    shown: pd.DataFrame
    styles: dict[str, Style]
    answers: Answers
    name: str


def claims(given: Inputs) -> Section | None:
    """The paper's claims next to the rows."""
    found = given.answers.claims
    if not found:
        return None
    folded = [claim for claim in found if claim.one_of_many and claim.verdict == HOLDS]
    if len(folded) < LEAST_FOLDED:
        folded = []
    shown = [claim for claim in found if claim not in folded]
    return page.section("claims", "The paper's claims", claims=shown, folded=folded)


def answers(given: Inputs) -> Section | None:
    """Sentences by question."""
    found = given.answers.groups
    return page.section("answers", "Answers", "Answers", groups=found) if found else None


def charts(given: Inputs) -> Section:
    """A chart for each suite."""
    by_suite = given.shown.groupby("suite", sort=False)
    suites = [{"name": suite, "chart": sweep(rows, given.styles)} for suite, rows in by_suite]
    return page.section("charts", "Charts", "Charts", suites=suites)


def export(given: Inputs) -> Section | None:
    """Exported files next to the formulations they were exported from."""
    found = exports.pairs(given.results)
    if not found:
        return None
    table, words = exports.table(found)
    return page.section(
        "export",
        "Which formulation to export",
        "Export",
        exported=page.sortable(table, "exported", words),
        to_export=list(exports.answers(found)),
    )


def roofline(given: Inputs) -> Section | None:
    """Every implementation of a chosen case under the measured roof."""
    chart = roofline_chart(given.shown, list(given.results.roofs.values()), given.styles)
    return page.section("roofline", "Roofline", "Roofline", roofline=chart) if chart else None


def peers(given: Inputs) -> Section | None:
    """Who computes another function, and what it costs."""
    found = peer_rows(given.table, given.results)
    return page.section("peers", "Who computes what", "Peers", peers=found) if found else None


def table(given: Inputs) -> Section:
    """Every row, and the files to save."""
    return page.section(
        "table",
        "All rows",
        "Table",
        table=rows_table(given.shown),
        downloads=page.downloads(given.table, given.name),
        cold="time_cold_s" in given.table,
        notes=above_roof(given.table),
    )


def samples(given: Inputs) -> Section | None:
    """The samples of a chosen row in the order of time, their distribution, and what they look like."""
    rows = packed(given.results.rows, given.shown)
    if not rows:
        return None
    timed = int((given.table["sample_count"] > 1).sum())
    specs = {"chart-samples": over_time(), "chart-distribution": distribution()}
    return page.section("samples", "Samples of a row", "Samples", rows=rows, specs=specs, left_out=timed - len(rows))


def failed(given: Inputs) -> Section:
    """Cases that were not timed, with the reasons."""
    return page.section("failed", "Not timed", "Not timed", failed=failures(given.shown))


def implementations(given: Inputs) -> Section:
    """What each implementation is."""
    shown = sorted((i for i in given.results.impls.values() if i.label in given.styles), key=lambda info: info.index)
    return page.section(
        "implementations", "Implementations", impls=shown, styles=given.styles, footnotes=footnotes(given.table)
    )


def method(given: Inputs) -> Section:
    """How rows are checked and timed."""
    return page.section("method", "Method", "Method")


def machine(given: Inputs) -> Section:
    """Hardware, software, what else the machine did, and roofs."""
    machines = [page.describe(found) for found in given.results.hardware().values()]
    return page.section(
        "machine",
        "Machine",
        machines=machines,
        roofs=list(given.results.roofs.values()),
        noise=noise(given.results),
        moments=[page.moment(found) for found in given.results.conditions],
    )


SECTIONS: tuple[Callable[[Inputs], Section | None], ...] = (
    claims,
    answers,
    charts,
    export,
    roofline,
    peers,
    table,
    samples,
    failed,
    implementations,
    method,
    machine,
)


def rows_table(table: pd.DataFrame) -> str:
    """Every row, sortable and filterable; figures to four digits, the files to save have them in full."""
    words = ["suite", *varying_axes(table), "impl", "status"]
    shown = table[words].assign(status=reported_statuses(table))
    shown.columns = pd.Index([COLUMNS[name].label for name in words])
    searched = list(shown.columns)
    for name, column in cells(table.columns).items():
        values = table[name].astype("float64")
        if values.notna().any():
            shown[column.heading] = [column.scaled(value) for value in values]
    if (table["reason"] != "").any():
        shown["reason"] = [reason if len(reason) <= 90 else reason[:89] + "…" for reason in table["reason"]]
    return page.sortable(shown, "rows", searched)


def peer_rows(table: pd.DataFrame, results: Results) -> list[dict[str, str]]:
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


def failures(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Cases that were not timed: one entry for each suite, implementation, status and reason, with its cases."""
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
