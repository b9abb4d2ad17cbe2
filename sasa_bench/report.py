"""One self-contained HTML file from results: findings, plots, the table, what did not run, the method."""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

import itables
import itables.options
import pandas as pd
from itables.javascript import generate_init_offline_itables_html
from jinja2 import Environment, FunctionLoader, StrictUndefined

from sasa_bench.findings import findings
from sasa_bench.machine import Machine
from sasa_bench.plot import QUANTITIES, Panel, draw, panels, style
from sasa_bench.record import COLUMNS, Results, ResultsError
from sasa_bench.table import frame, size, varying_axes

HOW_TO_READ = {
    "time_median_s": "Lower is faster. Both axes may be logarithmic; the band spans p20 to p80 of the rounds.",
    "peak_memory_bytes": "Memory in use at the worst moment of one call above what was in use before it.",
    "flops": "Useful work by the cost model, the same for every implementation of an op; lines may coincide.",
}


def html(results: Results) -> str:
    """The report as one page that opens offline.

    Raises ResultsError for rows of unlike machines, and for a file without rows.
    """
    if not results.rows:
        raise ResultsError("no rows to report: the run stopped before its first case was done")
    hardware = results.hardware()
    if len(hardware) > 1:
        raise ResultsError(
            f"the rows come from unlike machines ({', '.join(hardware)}), and times of one do not compare with times "
            "of another: make one report for each"
        )
    table = frame(results)
    names = sorted(set(table["impl"]))
    styles = style(results.impls, names)
    suites = []
    for suite in dict.fromkeys(table["suite"]):
        rows = table[table["suite"] == suite]
        figures = [_figures(panel, styles) for panel in panels(rows)]
        suites.append({"name": suite, "figures": figures, "rows": len(rows)})
    page = _environment().get_template("report.html")
    return page.render(
        machines=[_machine(machine) for machine in hardware.values()],
        findings=findings(results),
        warnings=results.warnings,
        suites=suites,
        how_to_read=HOW_TO_READ,
        impls=[results.impls[n] for n in names if n in results.impls],
        styles=styles,
        counts=table["status"].value_counts().to_dict(),
        table_script=generate_init_offline_itables_html(itables.options.dt_bundle),
        table=_sortable(table),
        failed=_failures(table),
        roofs=list(results.roofs.values()),
        started=min(table["started_at"]),
        ended=max(table["started_at"]),
    )


def write(results: Results, out: Path) -> None:
    """Write the report of `results` to `out`. Raises ResultsError as `html` does."""
    page = html(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def _figures(panel: Panel, styles: dict[str, tuple[str, str]]) -> dict[str, Any]:
    drawn = {}
    for quantity in QUANTITIES:
        if panel.data[quantity].notna().any():
            buffer = io.BytesIO()
            draw(panel, quantity, styles).savefig(buffer, format="svg")
            drawn[quantity] = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"facet": panel.facet, "images": drawn}


TABLE_UNITS = {
    "time_median_s": ("time, ms", 1e-3),
    "time_p20_s": ("p20, ms", 1e-3),
    "time_p80_s": ("p80, ms", 1e-3),
    "time_vs_conv3x3": ("time / conv3x3", 1.0),
    "flops": ("MFLOP", 1e6),
    "flops_per_s": ("GFLOP/s", 1e9),
    "roofline_fraction": ("of roofline, %", 1e-2),
    "peak_memory_bytes": ("peak memory, MiB", float(1 << 20)),
    "params": ("parameters, k", 1e3),
}
"""Column -> (label, stored units in one shown unit): one unit a column, so that it sorts."""


def _sortable(table: pd.DataFrame) -> str:
    shown = table[["suite", *varying_axes(table), "impl", "status"]].copy()
    shown.columns = pd.Index([COLUMNS[name].label for name in shown.columns])
    for column, (label, unit) in TABLE_UNITS.items():
        values = table[column].astype("float64") / unit
        shown[label] = [float(f"{v:.4g}") for v in values]
    return str(
        itables.to_html_datatable(
            shown,
            connected=False,
            showIndex=False,
            table_id="rows",
            display_logo_when_loading=False,
            lengthMenu=[25, 100, 1000],
            pageLength=25,
            scrollX=True,
            maxBytes=0,
            classes="display compact nowrap",
        )
    )


def _failures(table: pd.DataFrame) -> list[dict[str, str]]:
    failed = table[table["status"] != "ok"]
    axes = varying_axes(table)
    return [
        {name: row[name] for name in ("suite", "impl", "status", "reason")}
        | {"case": ", ".join(f"{COLUMNS[axis].label} {row[axis]}" for axis in axes)}
        for row in failed.to_dict("records")
    ]


def _machine(machine: Machine) -> dict[str, str]:
    return {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "instructions": ", ".join(machine.isa),
        "memory": size(machine.memory_bytes),
        "GPU": f"{machine.gpu} (driver {machine.driver})" if machine.gpu else "none",
        "system": f"{machine.os}, Python {machine.python}",
        "libraries": ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
        "worker environment": ", ".join(f"{name}={value}" for name, value in machine.environment.items()),
        "sasa-bench": machine.revision,
    }


def _environment() -> Environment:
    folder = resources.files("sasa_bench") / "templates"
    return Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
