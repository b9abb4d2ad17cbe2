"""What `sasa-bench list --markdown` prints: the tables of suites, axes and implementations in the documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from sasa_bench.case import AXES, CHOICES, Case
from sasa_bench.cli.doctor import implementations as known
from sasa_bench.results.record import DIFFERS
from sasa_bench.suite import Suite


def suites(chosen: Sequence[Suite]) -> str:
    """The question, the swept axes and the number of cases of each suite."""
    lines = ["| suite | question | sweeps | cases |", "|---|---|---|---|"]
    for suite in chosen:
        swept = ", ".join(f"`{axis}`" for axis in suite.axes) or "nothing"
        lines.append(f"| `{suite.name}` | {suite.title} | {swept} | {len(suite.cases)} |")
    return "\n".join(lines)


def axes() -> str:
    """The meaning, the default and the allowed values of each axis, from the docstring of `Case`."""
    meanings = _meanings()
    lines = ["| axis | default | meaning |", "|---|---|---|"]
    for axis in AXES:
        allowed = f"; one of {', '.join(f'`{value}`' for value in CHOICES[axis])}" if axis in CHOICES else ""
        lines.append(f"| `{axis}` | `{getattr(Case(), axis)}` | {meanings[axis]}{allowed} |")
    return "\n".join(lines)


def _meanings() -> dict[str, str]:
    """{axis: its lines in the docstring of `Case`, joined}."""
    entry = re.compile(r"^(\w+) {2,}(.*(?:\n {4,}.*)*)", re.MULTILINE)
    return {axis: " ".join(text.split()) for axis, text in entry.findall(inspect.getdoc(Case) or "")}


def implementations(names: Sequence[str] = ()) -> str:
    """The op and the summary of each implementation; a mark where it computes another function than the op."""
    lines = ["| implementation | computes | how |", "|---|---|---|"]
    for info, _ in known(names):
        mark, how = (f" {DIFFERS}", f" ({DIFFERS} {info.differs})") if info.differs else ("", "")
        lines.append(f"| `{info.name}`{mark} | {info.op.replace('_', ' ')} | {info.summary}{how} |")
    return "\n".join(lines)
