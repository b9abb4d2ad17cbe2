"""Renew what is generated in the documentation: python docs/tables.py

Suites, axes and implementations, from the package; networks, stems, ONNX files, other tools beside the gate and
the answer of the README, from committed results.
"""

from __future__ import annotations

import csv
import re
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path

from sasa_bench.cli import listing
from sasa_bench.report.table import frame
from sasa_bench.results.file import read
from sasa_bench.suite import load, shipped

DOCS = Path(__file__).parent
ANSWER = runpy.run_path(str(DOCS / "answer.py"))
REFERENCE = DOCS.parent / "reports" / "reference"
SUITES = REFERENCE / "sapphire-rapids-suites.jsonl"
NETWORKS = REFERENCE / "zen4-networks.jsonl"
DETECTORS = REFERENCE / "zen4-detection.jsonl"
WHOLE_NETWORKS = {
    "whole network": (NETWORKS, "networks", ("network", "stem")),
    "ResNet-50": (NETWORKS, "attention_groups", ("attention_groups",)),
    "ResNet-50, all groups": (NETWORKS, "stem", ("stem",)),
    "RetinaNet-50": (DETECTORS, "detection", ("stem", "attention_groups")),
}
"""First cell of a table -> the file and the suite that it shows, and the axes that name its lines."""
BASELINE = "convolutions"
"""The network that tests/studies/time_networks.py compares the others with."""


def renewed() -> Iterator[tuple[Path, str]]:
    """(page, its text with the tables of today)."""
    tables = {
        "suites.md": {"suite": listing.suites([load(path) for path in shipped().values()]), "axis": listing.axes()},
        "implementations.md": {"implementation": listing.implementations()},
        "paper.md": {
            "network": networks(REFERENCE / "networks"),
            "stem": stems(SUITES),
        },
        "onnx.md": {"layer": exported(SUITES)},
        "notes/gate.md": {"tool": other_tools(REFERENCE / "gate" / "validation.csv")},
        "notes/networks.md": {
            title: whole_networks(file, suite, title, axes) for title, (file, suite, axes) in WHOLE_NETWORKS.items()
        },
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


def networks(folder: Path) -> str:
    """Markdown: time over that of the convolutional network by way, from the files of tests/studies/time_networks.py.

    Each file is named after its network. A cell has the median of the ratios of neighbouring calls, and between which
    bounds three fifths of them lie.
    """
    ways: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["way"] not in ways:
                    ways.append(row["way"])
                if row["network"] == BASELINE:
                    continue
                low, ratio, high = (float(row[name]) for name in ("ratio_p20", "ratio", "ratio_p80"))
                cells = found.setdefault(f"{path.stem}, {row['network']}", {})
                cells[row["way"]] = f"**{ratio:.2f}** ({low:.2f}–{high:.2f})"
    lines = ["| network | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells.get(way, "") for way in ways) + " |" for name, cells in found.items()]
    return "\n".join(lines)


def other_tools(file: Path) -> str:
    """Markdown: what each tool found and flagged by mistake, from the file of tests/studies/gate_validation.py."""
    lines = ["| tool | slow-down found | the unchanged case flagged |", "|---|---|---|"]
    with file.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            found, false = f"{row['slow_downs_found']} of {row['slow_downs']}", f"{row['runs_false']} of {row['runs']}"
            lines.append(f"| {row['tool']} | {found} | {false} |")
    return "\n".join(lines)


def whole_networks(file: Path, suite: str, title: str, axes: Sequence[str]) -> str:
    """Markdown: time of each network of a suite with attention over one with 3 x 3 convolutions, by mode."""
    rows = frame(read([file]))
    rows = rows[rows["suite"] == suite]
    columns = [
        (f"{mode}, {words}", mode, impl, ratio)
        for mode in dict.fromkeys(rows["mode"])
        for words, impl, ratio in (
            ("`fused` over `conv3x3`", "fused", "time_vs_conv3x3"),
            ("`fused` over the fastest", "fused", ANSWER["RATIO"]),
            ("`unfold` over the fastest", "unfold", ANSWER["RATIO"]),
        )
        if impl in set(rows["impl"])
    ]
    named = {"network": "{}", "stem": "stem `{}`", "attention_groups": "groups `{}`"}
    lines = [f"| {title} | " + " | ".join(head for head, *_ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for values, found in rows.groupby(list(axes), sort=False):
        name = ", ".join(named[axis].format(value) for axis, value in zip(axes, values, strict=True))
        each = found.set_index(["mode", "impl"])
        cells = [ANSWER["cell"](each.loc[(mode, impl)], ratio) for _, mode, impl, ratio in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stems(file: Path) -> str:
    """Markdown: time of each stem by `fused`, one image of 224², over the fastest convolutional one, by mode."""
    rows = frame(read([file]))
    rows = rows[(rows["suite"] == "stem_layer") & (rows["impl"] == "fused")]
    rows = rows[(rows["resolution"] == "224") & (rows["batch"] == 1)]
    modes = list(dict.fromkeys(rows["mode"]))
    lines = ["| stem | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for stem, found in rows.groupby("stem", sort=False):
        each = found.set_index("mode")
        lines.append(f"| `{stem}` | " + " | ".join(ANSWER["cell"](each.loc[mode]) for mode in modes) + " |")
    return "\n".join(lines)


def exported(file: Path) -> str:
    """Markdown: time of each layer of the suite `onnx` over the fastest 3 x 3 convolution, by size and position."""
    rows = frame(read([file]))
    rows = rows[(rows["suite"] == "onnx") & (rows["scope"] == "layer") & (rows["op"] == "local_attention")]
    points = list(rows.groupby(["channels", "resolution", "position"], sort=False).groups)
    lines = ["| layer | " + " | ".join(_size(*point) for point in points) + " |", "|---" * (len(points) + 1) + "|"]
    for impl, found in rows.groupby("impl", sort=False):
        each = found.set_index(["channels", "resolution", "position"])
        lines.append(f"| `{impl}` | " + " | ".join(ANSWER["cell"](each.loc[point]) for point in points) + " |")
    return "\n".join(lines)


def _size(channels: int, resolution: str, position: str) -> str:
    return f"{channels} ch, {resolution}², {'no positions' if position == 'none' else position}"


def _answer(text: str) -> str:
    """The text of the README with the answer of today between its two comments."""
    begin, end = (
        re.search(r"<!-- python docs/answer\.py (.+) prints this table -->\n", text),
        "<!-- end of the answer -->",
    )
    if begin is None or end not in text:
        raise ValueError("README.md: the comments around the answer are gone")
    table = ANSWER["table"]([DOCS.parent / name for name in begin[1].split()])
    return text[: begin.end()] + table + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    for page, text in renewed():
        page.write_text(text)
