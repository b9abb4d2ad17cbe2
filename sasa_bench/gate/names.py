"""Names of cases on a page or in a comment: the axes that differ, and beside them once what all share."""

from __future__ import annotations

import re
from collections.abc import Sequence

_AXES = re.compile(r" (?:\w+=\S+(?: \w+=\S+)*|the default case)$")
"""What follows the implementation, whose path may hold spaces."""


def split(key: str) -> tuple[str, dict[str, str]]:
    """(implementation, axis -> value for the axes that it names) of a pairs.Point.key."""
    found = _AXES.search(key)
    impl, rest = (key[: found.start()], key[found.start() :]) if found else (key, "")
    return impl, dict(word.partition("=")[::2] for word in rest.split() if "=" in word)


def _axes(keys: Sequence[str]) -> dict[str, set[str | None]]:
    """axis -> its values; None where a key does not name it, which means the default."""
    named = [split(key)[1] for key in keys]
    axes = dict.fromkeys(axis for values in named for axis in values)
    return {axis: {values.get(axis) for values in named} for axis in axes}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """key -> the implementation with the axes that differ among the keys; every name stays unique."""
    differ = [axis for axis, values in _axes(keys).items() if len(values) > 1]
    parts = [split(key) for key in keys]
    return {
        key: " ".join([impl, *(f"{axis}={values[axis]}" for axis in differ if axis in values)])
        for key, (impl, values) in zip(keys, parts, strict=True)
    }


def shared_axes(keys: Sequence[str]) -> str:
    """The axes that all keys share: "batch=1 dtype=float32"."""
    return " ".join(f"{axis}={value}" for axis, (value, *more) in _axes(keys).items() if not more and value)
