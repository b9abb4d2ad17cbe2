"""The columns of the tidy table: what each is called, its unit, how it is loaded, and how every page writes it.

All readers take what they need from here: `table` (text, CSV, Parquet, typed loading), the sortable tables and the
charts of the report, the figures. To add a metric: one entry here, and the line that measures it. A figure that only
some implementations have goes into `extra` of their rows; `load`, the files and the report then show it by its entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from sasa_bench.case import AXES, Case
from sasa_bench.results import format

MIB = 1 << 20


@dataclass(frozen=True)
class Tick:
    """How a chart writes a number: a d3 format and the unit behind it."""

    form: str = "~s"
    unit: str = ""

    def of(self, value: str, digits: int | None = None) -> str:
        """The Vega expression that writes `value`, itself an expression, in full or to some digits."""
        precision = "" if digits is None else f".{digits}"
        return f"format({value}, '{precision}{self.form}') + '{self.unit}'"


@dataclass(frozen=True)
class Kind:
    """What columns of one nature share.

    dtype   of the loaded column: "float64", "int64", "Int64", "category", "string" or "datetime"; "" for pandas' guess
    text    how a text table writes a value
    cell    unit of a sortable table and its size in stored units: one for all rows, so that they sort
    tick    how an axis and a tooltip write a plotted value
    plot    stored units in one plotted unit
    """

    dtype: str
    text: Callable[[Any], str] = str
    cell: tuple[str, float] = ("", 1.0)
    tick: Tick = Tick()
    plot: float = 1.0


WORD = Kind("category")
SENTENCE = Kind("string")
MOMENT = Kind("datetime")
NUMBER = Kind("int64")
COUNT = Kind("Int64")
LARGE_COUNT = Kind("Int64", format.si, ("k", 1e3))
WORK = Kind("Int64", lambda value: format.si(value, "FLOP"), ("MFLOP", 1e6), Tick("~s", "FLOP"))
BYTES = Kind("Int64", format.size, ("MiB", MIB), Tick("~r", " MiB"), MIB)
FLOAT = Kind("float64", "{:.4g}".format)
TIME = Kind("float64", format.seconds, ("ms", 1e-3), Tick("~s", "s"))
RATE = Kind("float64", lambda value: format.si(value, "FLOP/s"), ("GFLOP/s", 1e9), Tick("~s", "FLOP/s"))
RATIO = Kind("float64", format.ratio, tick=Tick("~r", "×"))
SHARE = Kind("float64", format.percent, ("%", 1e-2), Tick("~%"))
ERROR = Kind("float64", format.error)


@dataclass(frozen=True)
class Column:
    """One column.

    label    for people
    kind     type, scale and formatting
    unit     of the stored value
    cell     heading of the column in the report's table, without its unit; "" keeps it out of that table
    title    words above a chart of the column; "" where it is not charted
    bounds   columns that hold the low and the high end of the value
    table    the table of the report that shows it: "rows", or "exports" for figures of exported files
    """

    label: str
    kind: Kind = WORD
    unit: str = ""
    cell: str = ""
    title: str = ""
    bounds: tuple[str, str] | None = None
    table: str = "rows"

    @property
    def heading(self) -> str:
        """Heading of a sortable table, with the unit of its figures."""
        unit = self.kind.cell[0]
        return f"{self.cell}, {unit}" if unit and self.cell != unit else self.cell

    def text(self, value: Any) -> str:
        """A value for people, scaled and with its unit; empty for none, not a number, or pandas' missing value."""
        if value is None or type(value).__name__ == "NAType" or value != value:
            return ""
        return self.kind.text(value)

    def scaled(self, value: float) -> float:
        """A stored value in the unit of `heading`, to four digits."""
        return float(f"{value / self.kind.cell[1]:.4g}")


_NUMBERS = {field.name for field in fields(Case) if field.type == "int"}
_UNITS = {"kernel_size": "pixels", "channels": "channels", "resolution": "pixels", "batch": "images"}

COLUMNS: dict[str, Column] = (
    {
        "suite": Column("suite"),
        "impl": Column("implementation"),
        "op": Column("op"),
        "status": Column("status"),
        "reason": Column("reason", SENTENCE),
    }
    | {
        axis: Column(axis.replace("_", " "), NUMBER if axis in _NUMBERS else WORD, _UNITS.get(axis, ""))
        for axis in AXES
    }
    | {
        "time_median_s": Column(
            "time, median",
            TIME,
            "s",
            cell="time",
            title="time of a call, p20 to p80",
            bounds=("time_p20_s", "time_p80_s"),
        ),
        "time_p20_s": Column("time, p20", TIME, "s", cell="p20"),
        "time_p80_s": Column("time, p80", TIME, "s", cell="p80"),
        "sample_count": Column("samples", COUNT),
        "flops": Column("FLOPs", WORK, "FLOP", cell="MFLOP", title="useful FLOPs"),
        "params": Column("parameters", LARGE_COUNT, cell="parameters", title="parameters"),
        "min_bytes": Column("least traffic", BYTES, "B"),
        "peak_memory_bytes": Column(
            "peak memory", BYTES, "B", cell="peak memory", title="peak memory of one call, MiB"
        ),
        "memory_source": Column("memory source"),
        "max_abs_err": Column("largest error", ERROR),
        "err_budget": Column("error budget", ERROR),
        "flops_per_s": Column("FLOP/s", RATE, "FLOP/s", cell="GFLOP/s", title="useful FLOP/s"),
        "roofline_fraction": Column("of roofline", SHARE, cell="of roofline", title="share of the roofline"),
        "time_vs_conv3x3": Column(
            "time / conv3x3",
            RATIO,
            cell="time / conv3x3",
            title="time / time of conv3x3",
            bounds=("time_vs_conv3x3_low", "time_vs_conv3x3_high"),
        ),
        "time_vs_conv3x3_low": Column("time / conv3x3, low", RATIO),
        "time_vs_conv3x3_high": Column("time / conv3x3, high", RATIO),
        "best_conv3x3": Column("fastest 3×3 convolution"),
        "time_vs_best_conv3x3": Column(
            "time / fastest conv3x3",
            RATIO,
            cell="time / fastest conv3x3",
            title="time / time of the fastest 3×3 convolution",
            bounds=("time_vs_best_conv3x3_low", "time_vs_best_conv3x3_high"),
        ),
        "time_vs_best_conv3x3_low": Column("time / fastest conv3x3, low", RATIO),
        "time_vs_best_conv3x3_high": Column("time / fastest conv3x3, high", RATIO),
        "needed_flops": Column("FLOPs needed", WORK, "FLOP"),
        "machine": Column("machine"),
        "commit": Column("commit"),
        "started_at": Column("started at", MOMENT),
    }
)
"""The columns that every table has, in order."""

EXTRAS: dict[str, Column] = {
    "differs": Column("computes another function", SENTENCE),
    "time_cold_s": Column("time, cold", TIME, "s", cell="cold", bounds=("time_cold_p20_s", "time_cold_p80_s")),
    "time_cold_p20_s": Column("time, cold, p20", TIME, "s"),
    "time_cold_p80_s": Column("time, cold, p80", TIME, "s"),
    "above_roof": Column("faster than the measured roof, times", RATIO),
    "disturbed": Column("processors used by others", SHARE),
    "stolen": Column("processors given away by the hypervisor", SHARE),
    "clock": Column("effective clock, of the fastest seen", SHARE),
    "spoiled_samples": Column("samples that the host disturbed", COUNT),
    "tf32": Column("products rounded to TF32"),
    "cudnn_benchmark": Column("cuDNN chooses by time"),
    "build_s": Column("time to build", TIME, "s"),
    "queue_s": Column("time to queue a call", TIME, "s"),
    "not_replayed": Column("why calls are queued by the host", SENTENCE),
    "sm_clock_mhz": Column("SM clock", FLOAT, "MHz"),
    "energy_j": Column("energy of a call", FLOAT, "J"),
    "throttled_samples": Column("samples dropped for throttling", COUNT),
    "export_s": Column("time to export", replace(TIME, cell=("s", 1.0)), "s", cell="export", table="exports"),
    "model_bytes": Column("size of the file", replace(BYTES, cell=("KiB", 1024.0)), "B", cell="file", table="exports"),
    "node_count": Column("nodes", COUNT, cell="nodes", table="exports"),
    "optimised_node_count": Column("nodes, optimised", COUNT, cell="nodes, optimised", table="exports"),
    "graph_flops": Column("FLOPs of the graph", WORK, "FLOP"),
    "session_s": Column("time to load", TIME, "s"),
}
"""The columns that a table has only where rows do; all but the first three stand in `extra` of a row."""

BROUGHT = {"export_s", "model_bytes", "node_count", "optimised_node_count", "graph_flops", "session_s"}
"""Columns that implementations bring along, about the file that they export."""

MEASURED = {*COLUMNS, *EXTRAS, "source_digest", "source_commit"} - BROUGHT
"""Columns that sasa-bench fills: figures that an implementation brings along have other names."""

_UNKNOWN = Kind("")
"""Of figures that an implementation from outside brings along."""


def column(name: str) -> Column:
    """The column of that name; for one that is not known here, a column with the name for a label."""
    return COLUMNS.get(name) or EXTRAS.get(name) or Column(name.replace("_", " "), _UNKNOWN)


def misfit(name: str, value: Any) -> str | None:
    """None, or why a value cannot stand in an extra column that is known here."""
    known = EXTRAS.get(name)
    if known is None or known.kind.dtype not in ("float64", "Int64"):
        return None
    whole = known.kind.dtype == "Int64"
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and (not whole or float(value).is_integer())
    return None if fits else f"{name} = {value!r}: give a {'whole ' if whole else ''}number"


def cells(names: Iterable[str], table: str = "rows") -> dict[str, Column]:
    """Those of `names` that a table of the report shows: times, ratios, memory, the rest."""
    found = {name: column(name) for name in names}
    return _reading_order({name: c for name, c in found.items() if c.cell and c.table == table})


def charted() -> dict[str, Column]:
    """What can stand on the upright axis of a chart, in the order of its menu."""
    return _reading_order({name: c for name, c in (COLUMNS | EXTRAS).items() if c.title})


def _reading_order(found: dict[str, Column]) -> dict[str, Column]:
    first = (TIME, RATIO, BYTES)
    return dict(sorted(found.items(), key=lambda item: first.index(k) if (k := item[1].kind) in first else len(first)))
