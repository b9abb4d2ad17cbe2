"""Values as words, for files and for people."""

from __future__ import annotations

from collections.abc import Sequence


def flops_key(name: str, input_shapes: Sequence[Sequence[int]]) -> str:
    """An operator with its input shapes as one word."""
    return f"{name} {joined_shapes(input_shapes)}"


def joined_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """[[2, 3], [], [3]] -> "2×3 3"."""
    return " ".join("×".join(map(str, dims)) for dims in shapes if dims)
