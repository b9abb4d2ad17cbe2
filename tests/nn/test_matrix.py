"""Every implementation, in every use inside a model, is right or refused by a known sentence, as docs/layer.md says."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "layer.md"


def table() -> dict[str, dict[str, str]]:
    """Use -> implementation -> cell, as the page has it."""
    rows = [
        line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "use")
    head = [name.strip("`") for name in rows[start]]
    found = {}
    for row in rows[start + 1 : start + 1 + len(matrix.COLUMNS)]:
        found[row[0]] = dict(zip(head[1:], row[1:], strict=True))
    return found


@pytest.mark.parametrize("column", matrix.COLUMNS)
@pytest.mark.parametrize("name", matrix.names())
def test_a_use_of_an_implementation_is_right_or_refused_as_the_page_says(name: str, column: str) -> None:
    if column == "ONNX":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert matrix.cell(name, column) == table()[column][name]


def test_the_page_names_every_use_and_every_sentence() -> None:
    assert list(table()) == list(matrix.COLUMNS)
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for sentence, letter in matrix.REFUSALS.items():
        assert f"({letter})" in text
        assert sentence in text
