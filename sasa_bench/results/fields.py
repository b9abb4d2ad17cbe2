"""Plain values from a file -> dataclasses, with every type checked: the file may come from anywhere."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

Made = TypeVar("Made")

MOST = 1 << 63
"""Whole numbers stay below it, as a column of a table does."""
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {10: " ", 13: " ", 9: " "}
"""Characters that move a cursor or break a line, a cell or an XML file; surrogates are no characters at all."""
CONTROL |= {code: f"\\u{code:04x}" for code in (*range(0xD800, 0xE000), 0x2028, 0x2029, 0xFFFE, 0xFFFF)}
CONTROL |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""What makes a word bold or coloured on a terminal."""


def printable(text: str) -> str:
    """The text on one line: control characters and marks that turn the direction of writing are spelled out.

    Colours of a terminal are left out.
    """
    return text if text.isascii() and text.isprintable() else _COLOUR.sub("", text).translate(CONTROL)


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message."""
    text = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {text[0]}") if text else type(error).__name__


def build(kind: type[Made], values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Made:
    """The dataclass `kind` with these fields; unknown ones are left out, `given` ones are used as they are.

    Raises TypeError for a value of another type than its field's, and for a number that is not finite.
    """
    hints = _hints(kind)  # type: ignore[arg-type]
    taken = dict(given or {})
    for name in hints:
        if name in values and name not in taken:
            taken[name] = _checked(values[name], hints[name], name)
    return kind(**taken)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, name)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (each for each in arguments if each is not types.NoneType)
        return _checked(value, hint, name)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(each, arguments[0], name) for each in value)
    if origin is dict and isinstance(value, dict):
        return {_checked(key, arguments[0], name): _checked(each, arguments[1], name) for key, each in value.items()}
    if hint is str and isinstance(value, str):
        return printable(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value, hint, name)
    raise TypeError(f"{name} = {_short(value)} is no {getattr(hint, '__name__', hint)}")


def _number(value: Any, hint: type, name: str) -> Any:
    if hint is int and not isinstance(value, int):
        raise TypeError(f"{name} = {_short(value)} is no whole number")
    if abs(value) >= MOST if isinstance(value, int) else not math.isfinite(value):
        raise TypeError(f"{name} = {_short(value)} is out of range")
    return value


def _plain(value: Any, name: str) -> Any:
    """A value of no stated type: text, a number, a truth value, None, or lists and tables of these."""
    if isinstance(value, str):
        return printable(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return _number(value, float, name)
    if isinstance(value, (list, tuple)):
        return [_plain(each, name) for each in value]
    if isinstance(value, dict):
        return {_plain(key, name): _plain(each, name) for key, each in value.items()}
    raise TypeError(f"{name} = {_short(value)} cannot be stored")


def _short(value: Any) -> str:
    # The text of a whole number with thousands of digits is refused by Python itself.
    text = "a huge number" if isinstance(value, int) and abs(value) >= MOST else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
