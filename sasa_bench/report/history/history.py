"""Past results files as a history: each case and implementation over commits, and where its level changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.history.changes import LEVEL, change_points, least_results, levels
from sasa_bench.report.history.series import HistoryError, Run, Series, collect, date_key, gather_series
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo


@dataclass(frozen=True)
class Change:
    """The level of `series` differs from result `index` on.

    before, after: medians of the results between this change and its neighbours. p_value: adjusted over all series.
    """

    series: Series
    index: int
    before: float
    after: float
    p_value: float

    @property
    def ratio(self) -> float:
        """Level after over level before."""
        return self.after / self.before

    @property
    def also_changed(self) -> str:
        """What else than the revision differs between the two runs beside the change: libraries, Python, system."""
        first, second = (self.series.runs[i].machine for i in (self.index - 1, self.index))
        before, after = _software(first), _software(second)
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return ", ".join(f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in names)


@dataclass(frozen=True)
class History:
    """All series with enough results, the changes among them, and sentences about what was left out."""

    series: list[Series]
    changes: list[Change]
    short: list[Series]
    runs: dict[str, list[Run]]
    impls: dict[str, ImplInfo]
    level: float
    order: str
    warnings: list[str]

    @property
    def verdict(self) -> str:
        """The first sentence of every form."""
        if not self.series:
            return f"No series has the {least_results(self.level)} results that a change point needs."
        if not self.changes:
            return f"No change in {len(self.series)} series at a false discovery rate of {100 * self.level:g} %."
        changed = len({change.series for change in self.changes})
        found = f"{len(self.changes)} change{'s' * (len(self.changes) != 1)}"
        return f"{found} in {changed} of {len(self.series)} series at a false discovery rate of {100 * self.level:g} %."

    def sentences(self) -> list[str]:
        """The verdict, and what stands behind it."""
        said = [self.verdict]
        for hardware, runs in self.runs.items():
            if len(runs) == 1:
                said.append(f"{hardware}: 1 run, {runs[0].words}.")
            else:
                said.append(
                    f"{hardware}: {len(runs)} runs, {runs[0].words} to {runs[-1].words}, in order {self.order}."
                )
        if self.short:
            least = least_results(self.level)
            most = max(len(series.values) for series in self.short)
            said.append(
                f"{len(self.short)} series have fewer than the {least} results that a change point needs at "
                f"{100 * self.level:g} % (the longest has {most}) and were not tested."
            )
        return said


def load(
    places: Path | Sequence[Path],
    impls: Sequence[str] = (),
    held: Mapping[str, Sequence[Any]] | None = None,
    level: float = LEVEL,
    repository: Path | None = None,
) -> History:
    """The history in these files and in every *.jsonl below these folders, of these implementations and cases.

    `held` are the values of axes that the cases have. Dates of commits come from the repository of sasa-bench and from
    `repository`, which git has to be safe to run in. A file that is no results file is left out with a warning. Raises
    HistoryError where nothing is left to show.
    """
    places = [places] if isinstance(places, Path) else list(places)
    points, infos, warnings = collect(places, repository)
    wanted = [
        (record, run)
        for record, run in points
        if (not impls or record.impl in {*impls, BASELINE})
        and all(getattr(record.case, axis) in values for axis, values in (held or {}).items())
    ]
    dated = all(run.committed is not None for _, run in wanted)
    order = "by date of commit" if dated else "by when they were measured: the repository does not know every commit"
    found = [s for s in gather_series(wanted, warnings, dated) if not impls or s.impl in impls]
    if not found:
        known = ", ".join(sorted({record.impl for record, _ in points})) or "none"
        raise HistoryError(
            f"{', '.join(map(str, places))} holds no row that is ok for what was asked; "
            f"implementations with results: {known}" + "".join(f"; {warning}" for warning in warnings[:3])
        )
    least = least_results(level)
    long = [s for s in found if len(s.values) >= least]
    located = change_points([s.values for s in long], level)
    changes = [
        Change(series, index, before, after, p)
        for series, places in zip(long, located, strict=True)
        for index, before, after, p in levels(series.values, places)
    ]
    changes.sort(key=lambda change: -abs(math.log(change.ratio)))
    runs = {
        hardware: sorted({run for s in found if s.hardware == hardware for run in s.runs}, key=date_key(dated))
        for hardware in dict.fromkeys(s.hardware for s in found)
    }
    short = [s for s in found if len(s.values) < least]
    return History(long, changes, short, runs, infos, level, order, warnings)


def _software(machine: Machine) -> dict[str, str]:
    return (
        machine.libraries
        | machine.environment
        | {"Python": machine.python, "system": machine.os, "driver": machine.driver}
    )
