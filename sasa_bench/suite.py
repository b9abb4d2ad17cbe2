"""A suite file -> cases: a title, implementations, axes to sweep and values to hold."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sasa_bench.case import AXES, Case, CaseError, UserError, closest, from_dict

KEYS = ("title", "impls", "axes", "fixed")


class SuiteError(UserError):
    """A suite file that cannot be used; the message states which file, what is wrong and what is allowed."""


@dataclass(frozen=True)
class Suite:
    """One question: `name` (the file's stem), `title`, implementations by name, and the cases to measure."""

    name: str
    title: str
    impls: tuple[str, ...]
    cases: tuple[Case, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Rows that a full run gives: cases times implementations."""
        return len(self.cases) * len(self.impls)


def shipped() -> dict[str, Path]:
    """The suites that come with the package, by bare name. A checkout keeps them beside the package."""
    package = Path(str(files("sasa_bench")))
    folder = next((place for place in (package / "suites", package.parent / "suites") if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def locate(path: Path) -> Path:
    """The file of a suite: a bare name is that of a shipped suite, everything else is the path of a file.

    Raises SuiteError for a bare name that no shipped suite has.
    """
    if path.suffix or len(path.parts) > 1 or path.is_file():
        return path
    known = shipped()
    if path.name not in known:
        if path.is_dir():
            return path
        raise SuiteError(
            f"{path}: no such suite; {closest(path.name, known)}the shipped suites are {', '.join(known)}; a suite of "
            "your own is the path of a .toml file"
        )
    return known[path.name]


def load(path: Path, overrides: Mapping[str, Sequence[Any]] | None = None) -> Suite:
    """Read a suite file, or the shipped suite of a bare name such as "kernel_size".

    A key of [axes] is a field of Case with a list of values; several fields swept together are one key, as in
    `"channels, kernel_size" = [[64, 13], [128, 19]]`. The cases are the product of the axes, the last one fastest.
    `overrides` maps a field to the values that replace the file's.

    Raises SuiteError for a file that is missing, does not parse, or has an unknown key, axis or value.
    """
    path = locate(path)
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such suite file{_nearby(path)}") from None
    except PermissionError:
        raise SuiteError(f"{path} cannot be read: change its permissions") from None
    except IsADirectoryError:
        raise SuiteError(f"{path} is a folder: name a suite file in it, such as {path}/smoke.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path} does not parse as TOML: {error}") from None
    try:
        return from_data(path.stem, data, overrides)
    except (SuiteError, CaseError) as error:
        given = f" with -c {', '.join(overrides)}" if overrides else ""
        raise SuiteError(f"{path}{given}: {error}") from None


def from_data(name: str, data: Mapping[str, Any], overrides: Mapping[str, Sequence[Any]] | None = None) -> Suite:
    """The suite in `data`, the parsed file. Raises SuiteError or CaseError."""
    for key in data:
        if key not in KEYS:
            raise SuiteError(f"unknown key {key!r}: {closest(key, KEYS)}a suite has the keys {', '.join(KEYS)}")
    title = data.get("title")
    if not isinstance(title, str) or not title.strip():
        raise SuiteError('title is missing or no text: give the question the suite answers, title = "..."')
    impls = data.get("impls")
    if not isinstance(impls, list) or not impls or not all(isinstance(i, str) for i in impls):
        raise SuiteError('impls is no list of names: list implementations, impls = ["unfold", "conv3x3"]')
    if len(set(impls)) < len(impls):
        raise SuiteError(f"impls = {impls} has one twice: list each once")
    for key in ("axes", "fixed"):
        if not isinstance(data.get(key, {}), dict):
            raise SuiteError(f"{key} = {data[key]!r} must be a table, [{key}]")
    table, fixed = data.get("axes", {}), dict(data.get("fixed", {}))
    axes = [_axis(key, values) for key, values in table.items()]
    for field, values in (overrides or {}).items():
        axes = [axis for axis in (_without(axis, field) for axis in axes) if axis[0]]
        fixed.pop(field, None)
        axes.append(((field,), [(value,) for value in values]))
    swept = [field for names, _ in axes for field in names]
    for field in swept:
        if swept.count(field) > 1 or field in fixed:
            raise SuiteError(f"{field} is given twice: an axis is either swept in [axes] or held in [fixed]")
    for field, value in fixed.items():
        if isinstance(value, list) and field != "resolution":
            raise SuiteError(f"{field} = {value} is a list in [fixed]: move it to [axes] to sweep it")
    if (size := math.prod(len(points) for _, points in axes)) > MOST_CASES:
        raise SuiteError(f"the axes have {size} combinations: sweep at most {MOST_CASES} in one suite")
    cases = []
    for point in itertools.product(*(points for _, points in axes)):
        fields: dict[str, Any] = dict(fixed)
        for (names, _), chosen in zip(axes, point, strict=True):
            fields |= dict(zip(names, chosen, strict=True))
        cases.append(from_dict(fields))
    return Suite(name, title.strip(), tuple(impls), tuple(dict.fromkeys(cases)), tuple(swept))


MOST_CASES = 1_000_000

Axis = tuple[tuple[str, ...], list[tuple[Any, ...]]]


def _axis(key: str, values: Any) -> Axis:
    names = tuple(part.strip() for part in key.split(","))
    for name in names:
        if name not in AXES:
            raise SuiteError(f"unknown axis {name!r}: {closest(name, AXES)}the axes are {', '.join(AXES)}")
    if not isinstance(values, list) or not values:
        raise SuiteError(f"axis {key!r} = {values!r}: give a list with at least one value")
    if len(names) == 1:
        return names, [(value,) for value in values]
    for value in values:
        if not isinstance(value, list) or len(value) != len(names):
            raise SuiteError(f"axis {key!r} has the point {value!r}: give {len(names)} values, one for each field")
    return names, [tuple(value) for value in values]


def _without(axis: Axis, field: str) -> Axis:
    names, points = axis
    if field not in names:
        return axis
    keep = [i for i, name in enumerate(names) if name != field]
    return tuple(names[i] for i in keep), list(dict.fromkeys(tuple(_hashable(p[i]) for i in keep) for p in points))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, dict)) else value


def _nearby(path: Path) -> str:
    found = sorted(map(str, path.parent.glob("*.toml"))) or [f"{name} (shipped)" for name in shipped()]
    return f"; there are {', '.join(found)}" if found else ""
