"""The tidy table: one row for each Record, figures derived from what was measured."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from sasa_bench.case import AXES, CHOICES, Case
from sasa_bench.report.baselines import ratios
from sasa_bench.report.services import EXPORTS
from sasa_bench.results.columns import COLUMNS, column
from sasa_bench.results.fields import printable
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.format import seconds
from sasa_bench.results.record import DIFFERS, STATUSES, Record, Results
from sasa_bench.results.statistics import FEWEST, NOISY

FORMULAS = ("=", "+", "-", "@")
"""How a formula begins for spreadsheets."""

FORMATS = ("text", "markdown", "csv", "parquet", *EXPORTS)
ABOVE_ROOF = "faster than the measured roof"
"""Of a row: its time is below the least that the measured peak and bandwidth allow."""

COLD = ("time_cold_s", "time_cold_p20_s", "time_cold_p80_s")


def load(*paths: str | Path) -> pd.DataFrame:
    """Results files as a table: a row for each case and implementation, times in seconds, memory in bytes.

    The columns are those of `sasa-bench table --format csv`, and figures that only some implementations have. Words are
    categories: `impl` in the order of the registry, axes such as `dtype` in that of their choices, `resolution` (a
    word, "28" or "28x56") by pixels. Counts are Int64, times and errors float64, `started_at` a time in UTC. What a row
    does not have, such as the time of one that is not "ok", is missing.

    Files of `sasa-bench run` and of pytest-benchmark are read alike. Warns of a line that is cut off, and of rows that
    differ in libraries or variables. Raises ResultsError for a file that is missing or not a results file.
    """
    results = read([Path(path) for path in paths])
    for sentence in results.warnings:
        warnings.warn(sentence, stacklevel=2)
    return _typed(frame(results), results)


def _typed(table: pd.DataFrame, results: Results) -> pd.DataFrame:
    order: dict[str, Sequence[str]] = {**CHOICES, "status": STATUSES}
    order["impl"] = sorted(results.impls, key=lambda name: results.impls[name].index)
    order["resolution"] = sorted(table["resolution"].unique(), key=_pixels)
    for name in map(str, table):
        dtype = column(name).kind.dtype
        if dtype == "datetime":
            table[name] = pd.to_datetime(table[name], utc=True, format="ISO8601", errors="coerce")
        elif dtype == "category":
            found = table[name].dropna().unique()
            known = [value for value in order.get(name, ()) if name in CHOICES or name == "status" or value in found]
            categories = [*known, *(value for value in found if value not in known)]
            table[name] = pd.Categorical(table[name], categories)
        elif not dtype or name == "differs":
            table[name] = table[name].convert_dtypes()
    return table


def _pixels(resolution: str) -> tuple[int, int]:
    case = Case(resolution=resolution)
    return case.height * case.width, case.height


def frame(results: Results) -> pd.DataFrame:
    """The tidy table of `results`.

    time_median_s, time_p20_s, time_p80_s: quantiles over rounds of the seconds per call, caches warm.
    time_cold_s, time_cold_p20_s, time_cold_p80_s: the same of cold calls; only where rows have them.
    flops_per_s: flops / time_median_s.
    roofline_fraction: least time by the measured peak and bandwidth of the machine / time_median_s; a row that is
    faster has that in above_roof instead.
    time_vs_conv3x3, best_conv3x3, time_vs_best_conv3x3 and their bounds: see baselines.ratios.
    differs: how the function of the implementation differs from those it stands next to, or "".
    """
    hardware = {key: machine.hardware_id for key, machine in results.machines.items()}
    rows = []
    for record, compared in zip(results.rows, ratios(results), strict=True):
        machine, info = results.machines.get(record.machine), results.impls.get(record.impl)
        stored = {name: getattr(record, name) for name in _STORED}
        stored |= record.case.to_dict() | {"resolution": str(record.case.resolution)}
        stored |= {
            "differs": info.differs if info else "",
            "machine": hardware.get(record.machine, record.machine),
            "commit": machine.revision if machine else "",
        }
        rows.append(stored | _derived(record, results) | compared | record.extra)
    extras = list(COLD) if any(record.cold_samples_s for record in results.rows) else []
    extras += ["above_roof"] if any("above_roof" in row for row in rows) else []
    extras += dict.fromkeys(name for record in results.rows for name in record.extra)
    table = pd.DataFrame(rows, columns=[*COLUMNS, "differs", *extras])
    for name in map(str, table):
        dtype: Any = column(name).kind.dtype
        if dtype in ("float64", "Int64"):
            table[name] = table[name].astype(dtype)
    return table


_STORED = [name for name in COLUMNS if name in {field.name for field in fields(Record)}]


def _derived(record: Record, results: Results) -> dict[str, Any]:
    """What follows from the samples of one row."""
    found: dict[str, Any] = {"sample_count": len(record.samples_s)}
    if record.samples_s:
        low, middle, high = np.quantile(record.samples_s, (0.2, 0.5, 0.8))
        found |= {"time_median_s": middle, "time_p20_s": low, "time_p80_s": high}
        if record.flops:
            found["flops_per_s"] = record.flops / middle
        roof = results.roofs.get((record.machine, record.case.device, record.case.dtype, record.case.threads))
        if roof and record.flops and record.min_bytes:
            share = roof.least_s(record.needed_flops or record.flops, record.min_bytes) / middle
            found |= {"roofline_fraction": share} if share <= 1 else {"above_roof": share}
    if record.cold_samples_s:
        found |= dict(zip(COLD, np.quantile(record.cold_samples_s, (0.5, 0.2, 0.8)), strict=True))
    return found


def varying_axes(table: pd.DataFrame) -> list[str]:
    """The axes with more than one value in the table, in the order of Case."""
    return [axis for axis in AXES if table[axis].nunique() > 1]


def has_parquet() -> bool:
    """Whether the package that writes Parquet files is installed."""
    try:
        import pyarrow  # noqa: F401 (the real import is in pandas)
    except ImportError:
        return False
    return True


def render(table: pd.DataFrame, form: str) -> bytes:
    """The table as a file: csv and parquet hold every column in base units; text and markdown what a person reads.

    The forms of exports.EXPORTS are for services that follow benchmarks. Raises ResultsError for an unknown form.
    """
    if form in EXPORTS:
        return EXPORTS[form](table).encode()
    if form == "csv":
        return table.apply(without_formulas).to_csv(index=False).encode()
    if form == "parquet":
        if not has_parquet():
            raise ResultsError("parquet needs pyarrow: pip install 'sasa-bench[parquet]'")
        buffer = io.BytesIO()
        table.apply(_of_one_type).to_parquet(buffer, index=False)
        return buffer.getvalue()
    styles = {"text": "simple", "markdown": "github"}
    if form not in styles:
        raise ResultsError(f"unknown format {form!r}: there are {', '.join(FORMATS)}")
    shown = display(marked(table)).map(lambda cell: one_cell(cell, form)).to_dict("list")
    body = tabulate(shown, headers="keys", tablefmt=styles[form], showindex=False, disable_numparse=True) + "\n"
    return (body + "".join(f"\n{note}\n" for note in [*footnotes(table), *above_roof(table)])).encode()


def _of_one_type(column: pd.Series) -> pd.Series:
    """A column whose values are of several types, such as 8 and "auto", as text; any other as it is."""
    kinds = {type(value) for value in column.dropna()} if column.dtype == object else set()
    return column.map(str, na_action="ignore") if len(kinds) > 1 else column


def without_formulas(column: pd.Series) -> pd.Series:
    """A column whose texts no spreadsheet takes for formulas: those that begin like one get an apostrophe in front."""
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column):
        return column
    return column.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell)


def one_cell(cell: Any, form: str) -> Any:
    """Text that stays within its cell of a table of text or Markdown."""
    if not isinstance(cell, str):
        return cell
    return printable(cell).replace("|", "\\|") if form == "markdown" else printable(cell)


def marked(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a mark behind the name of every implementation whose function differs."""
    names = [name + DIFFERS if differs else name for name, differs in zip(table["impl"], table["differs"], strict=True)]
    return table.assign(impl=names)


def footnotes(table: pd.DataFrame) -> list[str]:
    """What the mark means, a sentence for each implementation that has it."""
    found = table[table["differs"] != ""].drop_duplicates("impl")
    pairs = zip(found["impl"], found["differs"], strict=True)
    return [f"{DIFFERS} {name} computes another function: {differs}." for name, differs in pairs]


def above_roof(table: pd.DataFrame) -> list[str]:
    """A sentence on the rows that are faster than their roof; none where no row is."""
    found = table["above_roof"].dropna() if "above_roof" in table else pd.Series(dtype="float64")
    if found.empty:
        return []
    rows, have = ("1 row is", "has") if len(found) == 1 else (f"{len(found)} rows are", "have")
    times = column("above_roof").text(found.max())
    return [
        f"{rows} {ABOVE_ROOF}, by up to {times} times, and so {have} no share of it: the peak or bandwidth "
        "was measured too low there, usually because other work ran or because the data of a call stays in the caches."
    ]


READ_BY_PEOPLE = (
    "time_median_s",
    "time_vs_conv3x3",
    "time_vs_best_conv3x3",
    "flops",
    "flops_per_s",
    "roofline_fraction",
    "peak_memory_bytes",
    "status",
)


def display(table: pd.DataFrame, columns: Sequence[str] = READ_BY_PEOPLE) -> pd.DataFrame:
    """Strings for people: what varies, times with their p20 and p80, scaled units, the reason of what is not ok."""
    names = ["suite", *varying_axes(table), "impl", *columns]
    if table["suite"].nunique() == 1:
        names.remove("suite")
    shown = pd.DataFrame(
        {column(name).label: [column(name).text(value) for value in table[name]] for name in names},
        index=table.index,
    )
    spread = [
        f"{seconds(m)} ({seconds(a)} – {seconds(b)})" if m == m else ""
        for a, m, b in zip(table["time_p20_s"], table["time_median_s"], table["time_p80_s"], strict=True)
    ]
    shown[COLUMNS["time_median_s"].label] = spread
    for name in {"time_vs_conv3x3", "time_vs_best_conv3x3"} & set(columns):
        texts = zip(shown[COLUMNS[name].label], table[f"{name}_high"], strict=True)
        shown[COLUMNS[name].label] = [f"{text} (no interval)" if np.isinf(high) else text for text, high in texts]
    statuses = zip(reported_statuses(table), table["reason"], strict=True)
    shown["status"] = [f"{status}: {reason}" if reason else status for status, reason in statuses]
    return shown.rename(columns={COLUMNS["time_median_s"].label: f"{COLUMNS['time_median_s'].label} (p20 – p80)"})


def reported_statuses(table: pd.DataFrame) -> list[str]:
    """The status of each row for people: also whether it is too noisy to rank, or faster than its roof."""
    noisy = (table["sample_count"] >= FEWEST) & (table["time_p80_s"] > NOISY * table["time_p20_s"])
    above = table["above_roof"].notna() if "above_roof" in table else pd.Series(False, table.index)
    found = zip(table["status"], noisy.fillna(False), above, strict=True)
    return [", ".join([str(s)] + ["too noisy"] * bool(n) + [ABOVE_ROOF] * bool(a)) for s, n, a in found]
