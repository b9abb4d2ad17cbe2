"""The measuring of a run as a function, for scripts and notebooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from sasa_bench.case import Case, UserError
from sasa_bench.report.table import load
from sasa_bench.results.record import Record
from sasa_bench.suite import Suite
from sasa_bench.suite import load as load_suite
from sasa_bench.sweep import run as loop
from sasa_bench.sweep.plan import open_results
from sasa_bench.timing import probe
from sasa_bench.timing.settings import Settings

Measurable = Case | Suite | str | Path
"""A case, a suite, or the path of a suite file."""

BARE = "cases"
"""The name, in the column `suite`, of cases that come from no suite."""


def run(
    cases: Measurable | Iterable[Measurable],
    impls: Sequence[str | Path] = (),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    settings: Settings | None = None,
    timeout_s: float = 120.0,
    each: Callable[[Record], object] | None = None,
) -> pd.DataFrame:
    """Check and measure every case with every implementation in a worker process, as `sasa-bench run` does.

    cases       a Case, a Suite, the path of a suite file, or several of these
    impls       names, or paths of .py files that define IMPL; those of each suite by default, needed for a bare Case
    out         results file to keep; without it nothing is kept but what is returned
    resume      finish `out`: rows it has are not measured again
    settings    when a measurement is precise enough
    timeout_s   seconds that a stage of a row may take
    each        called with every Record as soon as it was measured

    Returns the table of `load`: one row for each case and implementation. What was wrong, crashed or took too long has
    a status and a reason, and no time.

    Raises UserError for a suite that cannot be read, an unknown implementation, a case without implementations, an
    `out` that is there already (without `resume`) or comes from another machine or sasa-bench.
    """
    specs = [_spec(impl) for impl in impls]
    suites = _suites(cases, specs)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "results.jsonl" if out is None else Path(out)
        machine = probe.detect()
        known = open_results(path, resume, machine)
        for sentence in known.warnings if known else ():
            warnings.warn(sentence, stacklevel=2)
        loop.run(
            suites,
            specs,
            path,
            known=known,
            machine=machine,
            settings=settings,
            timeout_s=timeout_s,
            watch=lambda summary, rows: [each(row) for row in rows] if each is not None else None,
        )
        return load(path)


def _spec(impl: object) -> str:
    if not isinstance(impl, str | Path):
        raise UserError(
            f"impls has {impl!r}: give the name of a registered implementation or the path of a .py file that defines "
            "IMPL; a worker process measures it, and that cannot see objects of this one"
        )
    return str(impl)


def _suites(cases: Measurable | Iterable[Measurable], impls: Sequence[str]) -> list[Suite]:
    given = list(cases) if isinstance(cases, Iterable) and not isinstance(cases, str) else [cases]
    bare = [item for item in given if isinstance(item, Case)]
    suites = []
    for item in given:
        if isinstance(item, Suite):
            suites.append(item)
        elif isinstance(item, str | Path):
            suites.append(load_suite(Path(item)))
        elif not isinstance(item, Case):
            raise UserError(f"cases has {item!r}: give a Case, a Suite or the path of a suite file")
    if bare and not impls:
        raise UserError('cases without a suite name no implementations: give impls=["unfold", "conv3x3"], for example')
    if bare:
        suites.append(Suite(BARE, "Cases of a script", tuple(impls), tuple(dict.fromkeys(bare)), ()))
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two suites are called {name!r}: give each a name of its own")
    if not suites:
        raise UserError("no cases: give a Case, a Suite, the path of a suite file, or a list of these")
    return suites
