"""The table that opens the README, from results of the suite `fused`: python docs/answer.py F.jsonl..."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sasa_bench.report.table import frame
from sasa_bench.results.file import read

RATIO = "time_vs_best_conv3x3"
POINT = ["channels", "resolution", "kernel_size"]
KIND = ["mode", "dtype"]
NAMES = {"forward": "inference", "training": "training"}


def table(files: Sequence[Path]) -> str:
    """Markdown: the fastest local attention layer over the fastest 3 x 3 convolution of the same case.

    A row for each mode and dtype, a column for each width, map and window; a cell has the ratio and its 95 % interval.
    Raises ValueError where the files hold no such ratio.
    """
    rows = frame(read(files))
    rows = rows[(rows["scope"] == "layer") & (rows["op"] == "local_attention") & rows[RATIO].notna()]
    if rows.empty:
        raise ValueError(f"{', '.join(map(str, files))}: no layer was compared with a convolution")
    best = rows.loc[rows.groupby([*KIND, *POINT], sort=False)["time_median_s"].idxmin()]
    points = list(dict.fromkeys(best[POINT].itertuples(index=False, name=None)))
    lines = ["||" + "|".join(_point(*point) for point in points) + "|", "|---" * (len(points) + 1) + "|"]
    for kind, cells in best.groupby(KIND, sort=False):
        mode, dtype = kind
        found = {tuple(each[name] for name in POINT): cell(each) for _, each in cells.iterrows()}
        lines.append(f"|{NAMES[mode]}, {dtype}|" + "|".join(found.get(point, "") for point in points) + "|")
    return "\n".join(lines)


def _point(channels: int, resolution: object, kernel_size: int) -> str:
    return f"{channels} ch, {resolution}², K={kernel_size}"


def cell(row: pd.Series, ratio: str = RATIO) -> str:
    """A ratio of a row and its 95 % interval."""
    low, high = row[f"{ratio}_low"], row[f"{ratio}_high"]
    return f"**{row[ratio]:.2f}** ({f'{low:.2f}–{high:.2f}' if math.isfinite(high) else 'no interval'})"


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
