"""Renew what is generated in the documentation: python docs/tables.py

Suites, axes and implementations, from the package; the answer of the README, from the results files that it names.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from sasa_bench.cli import listing
from sasa_bench.suite import load, shipped

DOCS = Path(__file__).parent


def renewed() -> Iterator[tuple[Path, str]]:
    """(page, its text with the tables of today)."""
    tables = {
        "suites.md": {"suite": listing.suites([load(path) for path in shipped().values()]), "axis": listing.axes()},
        "implementations.md": {"implementation": listing.implementations()},
    }
    for name, found in tables.items():
        text = (DOCS / name).read_text()
        for first, table in found.items():
            text, count = re.subn(rf"^\| {first} \|.*(?:\n\|.*)*", table.replace("\\", r"\\"), text, flags=re.MULTILINE)
            if count != 1:
                raise ValueError(f"{name}: {count} tables start with | {first} |, and one should")
        yield DOCS / name, text
    readme = DOCS.parent / "README.md"
    yield readme, _answer(readme.read_text())


def _answer(text: str) -> str:
    """The text of the README with the answer of today between its two comments."""
    begin, end = (
        re.search(r"<!-- python docs/answer\.py (.+) prints this table -->\n", text),
        "<!-- end of the answer -->",
    )
    if begin is None or end not in text:
        raise ValueError("README.md: the comments around the answer are gone")
    table = runpy.run_path(str(DOCS / "answer.py"))["table"]([DOCS.parent / name for name in begin[1].split()])
    return text[: begin.end()] + table + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    for page, text in renewed():
        page.write_text(text)
