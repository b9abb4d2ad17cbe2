"""Values as words, for files and for people."""

from __future__ import annotations

from collections.abc import Sequence


def _digits(value: float) -> str:
    """To three digits, without a power of ten where the number is large."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def seconds(value: float) -> str:
    """0.00213 -> "2.13 ms"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value * 1e9)} ns"


def si(value: float, unit: str = "") -> str:
    """1.85e8 -> "185 M"; 1.85e8, "FLOP/s" -> "185 MFLOP/s"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{_digits(value)} {unit}".rstrip()


def size(value: float) -> str:
    """3670016 -> "3.5 MiB"."""
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def ratio(value: float) -> str:
    """1.2345 -> "1.23", 12345.6 -> "12346"."""
    return _digits(value)


def percent(value: float) -> str:
    """0.0432 -> "4.3 %", 1.234 -> "123 %"."""
    return f"{100 * value:.0f} %" if value >= 0.995 else f"{100 * value:.2g} %"


def error(value: float) -> str:
    """0.00000123 -> "1.2e-06"."""
    return f"{value:.1e}"


def flops_key(name: str, input_shapes: Sequence[Sequence[int]]) -> str:
    """An operator with its input shapes as one word."""
    return f"{name} {joined_shapes(input_shapes)}"


def joined_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """[[2, 3], [], [3]] -> "2×3 3"."""
    return " ".join("×".join(map(str, dims)) for dims in shapes if dims)


def short_shapes(shapes: str, most: int = 48) -> str:
    """joined_shapes for a cell of a table: in full up to `most` characters, else the first and how many there are."""
    if len(shapes) <= most:
        return shapes
    each = shapes.split(" ")
    kept = [shape for i, shape in enumerate(each) if len(" ".join(each[: i + 1])) <= most]
    return f"{' '.join(kept)} … of {len(each)}"
