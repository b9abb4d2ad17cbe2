"""Which formulation to export: each exported file next to the PyTorch implementation of the same formulation."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sasa_bench.case import AXES, Case
from sasa_bench.report.baselines import apart
from sasa_bench.report.findings.ratios import ATTENTION, Ratio, ratio, span, times
from sasa_bench.results.columns import COLUMNS, EXTRAS, TIME, cells
from sasa_bench.results.record import ImplInfo, Record, Results


@dataclass(frozen=True)
class Pair:
    """An exported file of one case and what it was exported from.

    info   of the file's implementation
    file   its row, ok
    torch  the row of the PyTorch implementation of that formulation in the same file, suite and case, on the same
           machine; None where none is ok
    """

    info: ImplInfo
    file: Record
    torch: Record | None

    @property
    def ratio(self) -> Ratio | None:
        """Time of the file over that of PyTorch; None without the latter."""
        return ratio(self.file, self.torch) if self.torch else None


def pairs(results: Results) -> list[Pair]:
    """The ok rows of exported files, each with its counterpart; the last of several rows of one case."""
    rows = {
        (*apart(results, position), *record.key): record
        for position, record in enumerate(results.rows)
        if record.status == "ok"
    }
    found = []
    for (source, machine, suite, name, case), record in rows.items():
        info = results.impls.get(name)
        if info and info.exports:
            found.append(Pair(info, record, rows.get((source, machine, suite, info.exports, case))))
    return found


def table(found: Sequence[Pair]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each pair, times in ms, and the names of the columns that are words."""
    axes = [axis for axis in AXES if len({str(getattr(pair.file.case, axis)) for pair in found}) > 1]
    suites = {pair.file.suite for pair in found}
    unit, in_s = TIME.cell
    exported = cells(EXTRAS, "exports")
    rows = []
    for pair in found:
        words = {"suite": pair.file.suite} if len(suites) > 1 else {}
        words |= {COLUMNS[axis].label: str(getattr(pair.file.case, axis)) for axis in axes}
        words |= {
            "formulation": pair.info.exports,
            "file": pair.info.name,
            "sizes": "every size" if pair.info.any_size else "one size",
            "operators": "its own library" if pair.info.library else "standard",
        }
        against = pair.ratio
        figures = {
            f"PyTorch, {unit}": pair.torch.median_s / in_s if pair.torch else float("nan"),
            f"ONNX Runtime, {unit}": pair.file.median_s / in_s,
            "ONNX Runtime / PyTorch": against.value if against else float("nan"),
            "95 %, from": against.low if against and np.isfinite(against.high) else float("nan"),
            "to": against.high if against and np.isfinite(against.high) else float("nan"),
        }
        figures = {label: float(f"{value:.4g}") for label, value in figures.items()}
        figures |= {c.heading: c.scaled(float(pair.file.extra.get(name, "nan"))) for name, c in exported.items()}
        rows.append(words | figures)
    shown = pd.DataFrame(rows)
    return shown, [str(name) for name in shown if not pd.api.types.is_float_dtype(shown[name])]


Point = Mapping[str, Pair]
"""The pairs of one suite and case by the name of the file's implementation."""


def answers(found: Sequence[Pair]) -> Iterator[str]:
    """Which file of local attention to deploy, by how much, and what open sizes cost; none that rows do not support.

    A file is recommended where at more than half of the points it is faster than every other file, beyond the
    uncertainty, and slower than another at none. Files of every size are compared with those of one size of the same
    formulation only. Devices are told apart where there are several.
    """
    attention = [pair for pair in found if pair.file.op == ATTENTION]
    devices = list(dict.fromkeys(pair.file.case.device for pair in attention))
    for device in devices:
        here = [pair for pair in attention if pair.file.case.device == device]
        where = f" on {device}" if len(devices) > 1 else ""
        fixed = [pair for pair in here if not pair.info.any_size]
        name = yield from _recommended(_points(fixed), where)
        if any(pair.info.library for pair in fixed if pair.info.name == name):
            standard = [pair for pair in fixed if not pair.info.library]
            yield from _recommended(_points(standard), f"{where}, if it may use standard operators alone,")
        yield from _open_sizes(_points(here), where)


def _points(found: Sequence[Pair]) -> list[Point]:
    points: dict[tuple[str, Case], dict[str, Pair]] = {}
    for pair in found:
        points.setdefault((pair.file.suite, pair.file.case), {})[pair.info.name] = pair
    return list(points.values())


def _recommended(points: Sequence[Point], where: str) -> Generator[str, None, str | None]:
    """Yields the sentence on the file to export and returns its name; neither where the rows decide on none."""
    compared = [point for point in points if len(point) > 1]
    leads = {name: [_lead(point, name) for point in compared if name in point] for point in compared for name in point}
    for name, of_name in leads.items():
        ahead = [lead for lead in of_name if lead.low > 1]
        if len(of_name) < len(compared) or 2 * len(ahead) <= len(compared) or any(lead.high < 1 for lead in of_name):
            continue
        mine = [point[name] for point in compared]
        info = mine[0].info
        at = f"all {len(compared)} points" if len(compared) > 1 else "its one point"
        if len(ahead) < len(compared):
            at = f"{len(ahead)} of {len(compared)} points and slower than another at none"
        library = ", with its library" if info.library else ""
        said = (
            f"The formulation to export{where} is that of `{info.exports}`, as `{name}` does{library}: it is the "
            f"fastest file at {at}, {interval(ahead)} times as fast as the next"
        )
        against = [pair.ratio for pair in mine if pair.ratio]
        if against:
            said += f", and takes {interval(against)} times as long as `{info.exports}` in PyTorch"
        yield said + "."
        return name
    return None


def _lead(point: Point, name: str) -> Ratio:
    """Time of the file nearest to overtaking `name` over that of `name`."""
    return min((ratio(pair.file, point[name].file) for other, pair in point.items() if other != name), key=_low)


def _low(found: Ratio) -> tuple[float, float]:
    return found.low, found.value


def _open_sizes(points: Sequence[Point], where: str) -> Iterator[str]:
    found: dict[tuple[str, str], list[Ratio]] = {}
    for point in points:
        for name, pair in point.items():
            for other, fixed in point.items():
                if pair.info.any_size and not fixed.info.any_size and pair.info.exports == fixed.info.exports:
                    found.setdefault((name, other), []).append(ratio(pair.file, fixed.file))
    for (name, other), ratios in found.items():
        if all(r.known for r in ratios):
            decided = any(r.decided for r in ratios)
            said = f"One file for every size{where} (`{name}`) takes {interval(ratios)} times as long as `{other}`"
            yield said + ("." if decided else ": too close to call.")


def interval(ratios: Sequence[Ratio]) -> str:
    """ "1.9 to 12 (95 %: 1.8 to 14)": the span of the ratios, and from the lowest to the highest end of an interval."""
    low, high = min(r.low for r in ratios), max(r.high for r in ratios)
    ends = f"95 %: {times(low)} to {times(high)}" if np.isfinite(high) else "too few samples for an interval"
    return f"{span(r.value for r in ratios)} ({ends})"
