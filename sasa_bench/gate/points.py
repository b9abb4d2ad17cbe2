"""What a gate compares: the cases of both revisions' suites, with their implementations."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sasa_bench.case import Case
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.sources import Source, places
from sasa_bench.suite import Suite, SuiteError, from_data, load
from sasa_bench.timing.probe import available_cores


def points(
    suite: Path,
    sources: Sequence[Source],
    impls: Sequence[str] = (),
    overrides: Mapping[str, Sequence[Any]] | None = None,
    elsewhere: bool = False,
) -> list[Point]:
    """Every case of the suite, as each of the sources has it, with its implementations (`impls`, where given).

    `suite` is a path, or the bare name of a shipped suite. A case that one of the sources dropped is still compared, so
    that a slow-down cannot hide behind a deleted line. A suite that none of them holds is read where it lies. A case
    that asks for 0 threads gets every core of this machine, unless it is measured `elsewhere`.

    Raises SuiteError for a suite that cannot be read or sweeps threads.
    """
    found = _suites(suite, sources, overrides)
    cases = [case for one in found for case in one.cases]
    if len({case.threads for case in cases}) > 1:
        raise SuiteError(f"{suite} sweeps threads, and a gate has one number of them: give -c threads=1")
    wanted = {
        Point(impl, _resolved(case, elsewhere)): None
        for one in found
        for impl in dict.fromkeys(impls or one.impls)
        for case in one.cases
    }
    return list(wanted)


def _suites(path: Path, sources: Sequence[Source], overrides: Mapping[str, Sequence[Any]] | None) -> list[Suite]:
    # A checkout keeps the shipped suites, which have bare names elsewhere, in a folder of its own at its top.
    file = path if path.suffix == ".toml" else Path("suites") / f"{path}.toml"
    top = [] if path.suffix == ".toml" else [file.as_posix()]
    found = []
    for source, place in zip(sources, places(file, sources), strict=True):
        tried = [*top, *([place] if place else [])]
        text = next((text for each in tried if (text := source.read(each)) is not None), None)
        if text is None:
            continue
        try:
            found.append(from_data(path.stem, tomllib.loads(text), overrides))
        except tomllib.TOMLDecodeError as error:
            raise SuiteError(f"{path} of {source.text!r} does not parse as TOML: {error}") from None
        except ValueError as error:
            raise SuiteError(f"{path} of {source.text!r}: {error}") from None
    return found or [load(file if file.exists() else path, overrides)]


def _resolved(case: Case, elsewhere: bool) -> Case:
    return case if case.threads or elsewhere else case.with_(threads=available_cores())
