"""One self-contained HTML file from results: answers, charts, the table, what did not run, the method."""

from __future__ import annotations

from pathlib import Path

from sasa_bench.report import page
from sasa_bench.report.findings import answers
from sasa_bench.report.findings.noise import noise
from sasa_bench.report.sections import SECTIONS, Inputs
from sasa_bench.report.styles import style
from sasa_bench.report.table import frame, marked
from sasa_bench.results.file import ResultsError, require_described
from sasa_bench.results.record import Results
from sasa_bench.results.statistics import is_noisy

MANY_NOISY = 0.25
"""Share of the rows from which on the likely cause of noise stands below the headline."""


def html(results: Results, name: str = "results") -> str:
    """The report as one page that opens offline; `name` is that of the files that can be saved from it.

    Raises ResultsError for rows of unlike machines or of one that is not described, and for a file without rows.
    """
    if not results.rows:
        raise ResultsError("no rows to report: the run stopped before it finished a case")
    require_described(results)
    hardware = results.hardware()
    if len(hardware) > 1:
        raise ResultsError(
            f"the rows come from unlike machines ({', '.join(hardware)}), and times of one do not compare with times "
            "of another: give one file per machine, alone or together to `report --compare`"
        )
    table = frame(results)
    shown = marked(table)
    styles = style(results.impls, sorted(set(shown["impl"])))
    counts = table["status"].value_counts().to_dict()
    noisy = sum(is_noisy(row.samples_s) for row in results.rows)
    if noisy:
        counts = {f"{s}, {noisy} of them too noisy" if s == "ok" else s: count for s, count in counts.items()}
    given = Inputs(results, table, shown, styles, answers(results, table), name)
    return page.render(
        "report.html",
        machines=[page.describe_all(results.used_machines())],
        answers=given.answers,
        warnings=results.warnings,
        counts=counts,
        timed=bool((table["status"] == "ok").any()),
        noise=noise(results) if noisy > MANY_NOISY * len(table) else "",
        started=str(min(table["started_at"]))[:16].replace("T", " "),
        sections=[section for make in SECTIONS if (section := make(given))],
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def write(results: Results, out: Path) -> None:
    """Write the report of `results` to `out`. Raises ResultsError as `html` does."""
    page.write(html(results, out.stem), out)
