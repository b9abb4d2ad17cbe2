"""The commands on the pages of the documentation."""

from __future__ import annotations

import re

FENCED = re.compile(r"^ *```.*?\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def called_in_blocks(text: str) -> list[str]:
    """Every line of a code block of a page that calls sasa-bench, comment included; lines that go on are joined."""
    lines = [line.strip() for block in FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"sasa-bench \w", line)]
