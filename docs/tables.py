"""Renew the tables of suites, axes and implementations in the documentation: python docs/tables.py"""

from __future__ import annotations

import re
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


if __name__ == "__main__":
    for page, text in renewed():
        page.write_text(text)
