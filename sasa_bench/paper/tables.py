"""The tables of "Stand-Alone Self-Attention in Vision Models" (arXiv 1906.05909) as published and as computed here."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources

from tabulate import tabulate

from sasa_bench import ops
from sasa_bench.case import AXES, Case, from_dict
from sasa_bench.results.file import ResultsError
from sasa_bench.results.record import Record, Results
from sasa_bench.suite import Suite

TABLES = ("T1", "T2", "T3", "T4", "T5", "T6", "T7")
FORMATS = ("text", "markdown", "csv")
QUANTITIES = {"flops": ("FLOPs, B", 1e9), "params": ("parameters, M", 1e6)}
"""Quantity of a published cell -> its label and how many of the cost model make one of the paper's unit."""

MODES = {"inference_s": "forward", "training_s": "training"}
"""Quantity of a measured cell, in seconds per image -> mode of its case."""


@dataclass(frozen=True)
class Cell:
    """One figure of one row of one table.

    quantity         flops, in B (1e9 operations of a forward pass of one image), params, in M, or inference_s or
                     training_s with the implementation after a colon, in seconds per image
    paper            as published, with its decimals; "" for what the paper does not give
    ours             as computed or measured here, in the same unit; None where it could not be measured
    difference       ours - paper, or None
    within_rounding  whether ours rounds to what is published, or None
    """

    table: str
    row: str
    quantity: str
    paper: str
    ours: float | None
    difference: float | None = None
    within_rounding: bool | None = None


@dataclass(frozen=True)
class Published:
    """A cell of the paper and the network it is about, at batch 1."""

    table: str
    row: str
    quantity: str
    paper: str
    case: Case


@cache
def published() -> tuple[Published, ...]:
    """Every figure of FLOPs and parameters in the paper's tables, in their order."""
    lines = resources.files("sasa_bench.paper").joinpath("published.csv").read_text(encoding="utf-8").splitlines()
    found = []
    for line in csv.DictReader(lines):
        table, row, quantity, paper = (line.pop(name) for name in ("table", "row", "quantity", "paper"))
        case = from_dict({"scope": "network", "batch": 1} | line | {"kernel_size": int(line["kernel_size"])})
        found.append(Published(table, row, quantity, paper, case))
    return tuple(found)


def cells(tables: Sequence[str] = TABLES) -> list[Cell]:
    """The figures of these tables from the cost model, beside the published ones. Raises ResultsError for no table."""
    for table in tables:
        if table not in TABLES:
            raise ResultsError(f"unknown table {table!r}: there are {', '.join(TABLES)}")
    found = []
    for given in published():
        if given.table in tables:
            total = getattr(ops.get("local_attention").cost(given.case), given.quantity)
            ours = total / QUANTITIES[given.quantity][1]
            decimals = len(given.paper.partition(".")[2])
            within = f"{ours:.{decimals}f}" == given.paper
            difference = ours - float(given.paper)
            found.append(Cell(given.table, given.row, given.quantity, given.paper, ours, difference, within))
    return found


def suite(tables: Sequence[str], impls: Sequence[str], device: str) -> Suite:
    """The networks of these tables as cases to measure, each once: forward, and for classifiers training as well.

    Training a detector at 640 pixels takes more memory than its implementations can be compared in.
    """
    cases = dict.fromkeys(
        given.case.with_(mode=mode, device=device)
        for given in published()
        for mode in MODES.values()
        if given.table in tables and not (mode == "training" and given.case.network.startswith("retinanet"))
    )
    return Suite("paper", "What do the networks of the paper take in time?", tuple(impls), tuple(cases), AXES)


def timed(tables: Sequence[str], results: Results) -> list[Cell]:
    """Median seconds per image of the rows that measure the networks of these tables.

    Where they differ in device, threads or machine, the quantity names these too.
    """
    found = []
    measured = [record for record in results.rows if record.case.scope == "network"]
    ways: tuple[Callable[[Record], str], ...] = (
        lambda record: record.case.device,
        lambda record: f"{record.case.threads} threads",
        lambda record: record.machine,
    )
    several = [way for way in ways if len({way(record) for record in measured}) > 1]
    for given in published():
        if given.table not in tables or given.quantity != "flops":
            continue
        for quantity, mode in MODES.items():
            for record in measured:
                case = record.case
                if case.with_(mode="forward", threads=0, device="cpu") == given.case and case.mode == mode:
                    ours = statistics.median(record.samples_s) / case.batch if record.samples_s else None
                    who = ", ".join([record.impl, *(way(record) for way in several)])
                    found.append(Cell(given.table, given.row, f"{quantity}:{who}", "", ours))
    return found


def render(found: Sequence[Cell], form: str) -> str:
    """The cells as csv, one line each, or as text or markdown, one table each. Raises ResultsError for another form."""
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [f.name for f in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        for cell in found:
            writer.writerow({name: "" if value is None else value for name, value in asdict(cell).items()})
        return buffer.getvalue()
    if form not in FORMATS:
        raise ResultsError(f"unknown format {form!r}: there are {', '.join(FORMATS)}")
    style, heading = ("github", "### {}\n\n") if form == "markdown" else ("simple", "{}\n")
    parts = []
    for table in dict.fromkeys(cell.table for cell in found):
        rows = [_line(cell) for cell in found if cell.table == table]
        headers = ("", "", "paper", "ours", "difference", "rounds to it")
        columns = [i for i in range(len(headers)) if any(row[i] for row in rows)]
        body = tabulate(
            [[row[i] for i in columns] for row in rows],
            headers=[headers[i] for i in columns],
            tablefmt=style,
            disable_numparse=True,
        )
        parts.append(heading.format(table) + body + "\n")
    return "\n".join(parts)


def _line(cell: Cell) -> tuple[str, ...]:
    if cell.quantity in QUANTITIES:
        label, decimals = QUANTITIES[cell.quantity][0], 2
    else:
        kind, _, impl = cell.quantity.partition(":")
        label, decimals = f"{kind.removesuffix('_s')}, s, {impl}", 4
    ours = "not measured" if cell.ours is None else f"{cell.ours:.{decimals}f}"
    difference = "" if cell.difference is None else f"{round(cell.difference, 2) + 0.0:+.2f}"
    within = {None: "", True: "yes", False: "no"}[cell.within_rounding]
    return cell.row, label, cell.paper, ours, difference, within
