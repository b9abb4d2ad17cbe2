"""How often two runs of one machine contradict each other: intervals of the same ratio that have no value in common.

`python tests/studies/disjoint_intervals.py A.jsonl B.jsonl ...` takes every pair of files, every case and every
implementation that is ok in both, and counts the pairs of 95 % intervals of `time_vs_conv3x3` that are disjoint; the
same for `time_vs_best_conv3x3` where both files found the same convolution to be the fastest. Of true 95 % intervals
less than 1 % would be. A ratio without an interval says nothing that another could contradict: it is not counted.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sasa_bench.case import AXES, UserError
from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.table import load

RATIOS = ("time_vs_conv3x3", "time_vs_best_conv3x3")
KEYS = ["suite", "impl", *AXES]


@dataclass(frozen=True)
class Disjoint:
    """Two intervals of one ratio without a common value; `where` names suite, implementation, axes and files."""

    ratio: str
    where: str
    first: tuple[float, float]
    second: tuple[float, float]


def compare(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> dict[str, tuple[int, list[Disjoint]]]:
    """Ratio -> (pairs of intervals compared, those that are disjoint), over every pair of tables.

    Raises UserError for tables of more than one machine.
    """
    if len({machine for table in tables for machine in table["machine"]}) > 1:
        raise UserError("the files come from more than one machine: compare runs of one")
    found: dict[str, tuple[int, list[Disjoint]]] = {ratio: (0, []) for ratio in RATIOS}
    pairs = itertools.combinations(zip(tables, names, strict=True), 2)
    for ((first, name), (second, other)), ratio in itertools.product(pairs, RATIOS):
        count, disjoint = _disjoint(first, second, ratio, f"{name} and {other}")
        found[ratio] = found[ratio][0] + count, found[ratio][1] + disjoint
    return found


def _disjoint(first: pd.DataFrame, second: pd.DataFrame, ratio: str, files: str) -> tuple[int, list[Disjoint]]:
    bounds = [f"{ratio}_low", f"{ratio}_high"]
    over = "best_conv3x3" if ratio == "time_vs_best_conv3x3" else None
    columns = [*bounds, *([over] if over else [])]
    left, right = (table.astype(dict.fromkeys(KEYS, str)).set_index(KEYS)[columns] for table in (first, second))
    both = left.add_suffix(" a").join(right.add_suffix(" b")).replace(np.inf, np.nan).dropna()
    impls = both.index.get_level_values("impl")
    if over:
        best = both[f"{over} a"].astype(str)
        both = both[(best == both[f"{over} b"].astype(str)) & (best != impls)]
    else:
        both = both[impls != BASELINE]
    low_a, high_a, low_b, high_b = (both[f"{bound} {side}"] for side in "ab" for bound in bounds)
    apart = both[(high_a < low_b) | (high_b < low_a)]
    found = []
    for index, row in apart.iterrows():
        ends = [(float(row[f"{bounds[0]} {side}"]), float(row[f"{bounds[1]} {side}"])) for side in "ab"]
        named = ", ".join(f"{key}={value}" for key, value in zip(KEYS, index, strict=True))  # type: ignore[call-overload]
        found.append(Disjoint(ratio, f"{named}: {files}", *ends))
    return len(both), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--list", action="store_true", help="print every disjoint pair")
    files = parser.parse_args().files
    if len(files) < 2:
        parser.error("give two files or more")
    tables = [load(path) for path in files]
    if len(commits := {str(commit) for table in tables for commit in table["commit"]}) > 1:
        print(f"the files come from {len(commits)} revisions: {', '.join(sorted(commits))}")
    found = compare(tables, [path.name for path in files])
    for ratio, (count, disjoint) in found.items():
        share = f"{len(disjoint) / count:.2%}" if count else "none to compare"
        print(f"{ratio}: {len(disjoint)} of {count} pairs of intervals are disjoint ({share})")
        for pair in disjoint if parser.parse_args().list else ():
            (low, high), (other_low, other_high) = pair.first, pair.second
            print(f"  {pair.where}: {low:.3f} to {high:.3f}, {other_low:.3f} to {other_high:.3f}")


if __name__ == "__main__":
    main()
