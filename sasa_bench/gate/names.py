"""Names of cases on a page or in a comment: the axes that differ, and beside them once what all share."""

from __future__ import annotations

from collections.abc import Sequence


def _parsed(keys: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
    found = {}
    for key in keys:
        impl, _, rest = key.partition(" ")
        found[key] = impl, dict(word.partition("=")[::2] for word in rest.split() if "=" in word)
    return found


def _axes(keys: Sequence[str]) -> dict[str, set[str | None]]:
    """axis -> its values; None where a key does not name it, which means the default."""
    parsed = _parsed(keys)
    names = dict.fromkeys(name for _, values in parsed.values() for name in values)
    return {axis: {values.get(axis) for _, values in parsed.values()} for axis in names}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """key -> the implementation with the axes that differ among the keys; every name stays unique."""
    differ = [axis for axis, values in _axes(keys).items() if len(values) > 1]
    return {
        key: " ".join([impl, *(f"{axis}={values[axis]}" for axis in differ if axis in values)])
        for key, (impl, values) in _parsed(keys).items()
    }


def shared_axes(keys: Sequence[str]) -> str:
    """The axes that all keys share: "batch=1 dtype=float32"."""
    return " ".join(f"{axis}={value}" for axis, (value, *more) in _axes(keys).items() if not more and value)
