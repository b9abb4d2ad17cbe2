"""Sets the gate beside pytest-benchmark, benchmatrix, asv and pyperf: false alarms and power, same cases.

Each repeat compares code in which some cases are slowed on purpose; after all of these, each compares identical code.
The gate goes first; the others get the wall time that it has taken in the median so far, by scaling their rounds, but
never less than the least that lets them work. Every comparison is a line of OUT.jsonl, from which OUT.csv and OUT.md
are made anew each time; stopped, the same command goes on where it was.

    python tests/studies/gate_validation.py --repeats 20 --out reports/reference/gate/validation
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from other_tools import COMPARE, ROOT, THRESHOLD, Job, ValidationError
from scipy import stats
from tabulate import tabulate

from sasa_bench import impls as registry
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.verdicts import Rules
from sasa_bench.suite import load
from sasa_bench.timing.probe import available_cores, detect

TOOLS = tuple(COMPARE)


@dataclass(frozen=True)
class Comparison:
    """One comparison of base with head by one tool.

    of: what is compared on which machine, in words; comparisons of other things are not counted together.
    slowed: cases slowed on purpose in head by `ratio`; the rest are as in other_tools.Outcome.
    """

    tool: str
    of: str
    settings: str
    ratio: float
    repeat: int
    cases: list[str]
    slowed: list[str]
    flagged: list[str]
    red: bool
    seconds: float
    effort: float
    repeated: int
    at: str


def compare(tool: str, points: Mapping[str, Point], slowed: Sequence[str], ratio: float, repeat: int,
            seconds: float, effort: float | None, of: str) -> Comparison:  # fmt: skip
    """Let one tool compare base with head in a folder of its own, which is removed."""
    with tempfile.TemporaryDirectory(prefix="gate-validation-") as folder:
        job = Job(points, slowed, ratio, seconds, effort, Path(folder))
        begun = time.monotonic()
        said = COMPARE[tool](job)
        spent = time.monotonic() - begun
    at = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"ratio": ratio, "repeat": repeat, "cases": list(points), "slowed": list(slowed)}
    return Comparison(tool, of, **about, **vars(said), seconds=spent, at=at)  # type: ignore[arg-type]


def next_effort(tool: str, done: Sequence[Comparison], seconds: float) -> float | None:
    """The effort that would fill `seconds`, from what the last comparison took; None before the first one.

    A comparison takes a fixed time and, for a unit of effort, as much as the tool repeats it.
    """
    last = next((c for c in reversed(done) if c.tool == tool), None)
    if last is None or not last.repeated:
        return None
    return max(last.effort + (seconds - last.seconds) / last.repeated, 1e-3)


@dataclass(frozen=True)
class Rates:
    """What one tool did.

    runs, false     comparisons, and how many of them flagged a case of identical code
    alike, red      comparisons of identical code, and how many of them would have failed a CI job
    slowed, found   slow-downs, and how many of them were flagged
    """

    tool: str
    settings: str
    minutes: float
    runs: int
    false: int
    alike: int
    red: int
    slowed: int
    found: int

    def to_dict(self) -> dict[str, Any]:
        """A row of the table, with exact (Clopper-Pearson) 95 % intervals; empty where nothing was measured."""
        row: dict[str, Any] = {
            "tool": self.tool,
            "settings": self.settings,
            "minutes_per_comparison": round(self.minutes, 2),
        }
        for part, hits, whole, count in (
            ("runs_false", self.false, "runs", self.runs),
            ("alike_red", self.red, "alike", self.alike),
            ("slow_downs_found", self.found, "slow_downs", self.slowed),
        ):
            bounds = stats.binomtest(hits, count).proportion_ci(0.95, method="exact") if count else None
            row |= {part: hits, whole: count}
            row |= {
                f"{part}_low": round(bounds.low, 4) if bounds else "",
                f"{part}_high": round(bounds.high, 4) if bounds else "",
            }
        return row


def rates(done: Sequence[Comparison]) -> list[Rates]:
    """A line for each tool, in the order of TOOLS."""
    found = []
    for tool in TOOLS:
        own = [c for c in done if c.tool == tool]
        if not own:
            continue
        found.append(
            Rates(
                tool,
                own[-1].settings,
                statistics.median(c.seconds for c in own) / 60,
                len(own),
                sum(bool(set(c.flagged) - set(c.slowed)) for c in own),
                sum(not c.slowed for c in own),
                sum(c.red for c in own if not c.slowed),
                sum(len(c.slowed) for c in own),
                sum(len(set(c.slowed) & set(c.flagged)) for c in own),
            )
        )
    return found


def write(done: Sequence[Comparison], out: Path) -> None:
    """OUT.csv and OUT.md from all comparisons."""
    table = [one.to_dict() for one in rates(done)]
    if not table:
        return
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    shown = [
        {
            "tool": row["tool"],
            "settings": row["settings"],
            "minutes a comparison": row["minutes_per_comparison"],
            "with a false alarm": _share(row, "runs_false", "runs"),
            "of identical code, not passed": _share(row, "alike_red", "alike"),
            "slow-downs found": _share(row, "slow_downs_found", "slow_downs"),
        }
        for row in table
    ]
    text = tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)
    out.with_suffix(".md").write_text(f"{done[-1].of}.\n\n{text}\n", encoding="utf-8")


def _share(row: Mapping[str, Any], part: str, whole: str) -> str:
    if not row[whole]:
        return "not measured"
    return f"{row[part]} of {row[whole]} ({row[f'{part}_low']:.1%} to {row[f'{part}_high']:.1%})"


def read(path: Path) -> list[Comparison]:
    """The comparisons of a journal; a last line that was cut off is left out."""
    done = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            done.append(Comparison(**json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValidationError(f"{path}, line {number}, is no comparison: move the file away") from None
    return done


def choose(path: Path, count: int, impls: Sequence[str] = ()) -> dict[str, Point]:
    """`count` points spread evenly over those of a suite that can run, named c00, c01, …"""
    suite = load(path, {})
    cores = available_cores()
    cases = [case if case.threads else case.with_(threads=cores) for case in suite.cases]
    points = [
        Point(impl, case)
        for impl in impls or suite.impls
        for case in cases
        if registry.get(impl).supports(case) is None
    ]
    if not 1 <= count <= len(points):
        raise ValidationError(f"--cases {count}: {path} has {len(points)}")
    return {f"c{i:02d}": points[i * len(points) // count] for i in range(count)}


def compared(points: Mapping[str, Point], slowed: int, ratio: float) -> str:
    """What is compared, by which rules and where, in words."""
    rules = Rules()
    threads = next(iter(points.values())).case.threads
    keys = hashlib.sha256("\n".join(point.key for point in points.values()).encode()).hexdigest()[:6]
    return (
        f"{len(points)} cases ({keys}) with {threads} threads, {slowed} of them {ratio - 1:.0%} slower in "
        "comparisons of slowed code; "
        f"the gate takes {rules.screen_pairs} + {rules.confirm_pairs} pairs, the others let {THRESHOLD} % pass; "
        f"on {detect().hardware_id}"
    )


def plan(done: Sequence[Comparison], tools: Sequence[str], repeats: int, ratio: float) -> list[tuple[int, float, str]]:
    """(repeat, ratio, tool) of the comparisons that are missing: of slowed code first, the gate before the others."""
    had = {(c.repeat, c.ratio, c.tool) for c in done}
    wanted = []
    for one in (ratio, 1.0):
        for repeat in range(repeats):
            others = [tool for tool in TOOLS[1:] if tool in tools]
            random.Random(f"{repeat} {one}").shuffle(others)
            wanted += [(repeat, one, tool) for tool in (["gate"] if "gate" in tools else []) + others]
    return [item for item in wanted if item not in had]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, append, and write the table after each comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/reference/gate/validation"))
    parser.add_argument("--repeats", type=int, default=20, help="comparisons of identical and of slowed code, per tool")
    parser.add_argument("--suite", type=Path, default=ROOT / "suites" / "gate.toml")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--impl", action="append", default=[], help="only this implementation; repeatable")
    parser.add_argument("--slowed", type=int, default=2, help="cases slowed in each comparison of slowed code")
    parser.add_argument("--ratio", type=float, default=1.10, help="how much longer a slowed case takes")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds the gate may take")
    parser.add_argument("--seconds", type=float, help="give the other tools this time instead of the gate's")
    given = parser.parse_args(arguments)
    points = choose(given.suite, given.cases, given.impl)
    if not 0 < given.slowed <= len(points) or given.ratio <= 1:
        parser.error(f"--slowed: 1 to {len(points)}; --ratio: more than 1")
    journal = given.out.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = read(journal)
    except ValidationError as error:
        parser.error(str(error))
    of = compared(points, given.slowed, given.ratio)
    if other := next((one.of for one in done if one.of != of), None):
        parser.error(f"{journal} compares something else ({other}; here {of}): give another --out")
    failed = 0
    for repeat, ratio, tool in plan(done, given.tool or TOOLS, given.repeats, given.ratio):
        by_the_gate = [c.seconds for c in done if c.tool == "gate"]
        seconds = given.seconds or (statistics.median(by_the_gate) if by_the_gate else given.budget)
        # The same cases are slowed for every tool.
        slowed = random.Random(repeat).sample(list(points), given.slowed) if ratio > 1 else []
        effort = next_effort(tool, done, seconds)
        limit = given.budget if tool == "gate" else seconds
        try:
            one = compare(tool, points, slowed, ratio, repeat, limit, effort, of)
        except ValidationError as error:
            failed += 1
            print(f"{tool}, repeat {repeat + 1}: {error}", file=sys.stderr)
            continue
        one = replace(one, seconds=round(one.seconds, 1))
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        done.append(one)
        write(done, given.out)
        words = f"slowed {', '.join(slowed)}" if slowed else "identical code"
        print(
            f"{tool}, repeat {repeat + 1}, {words}: flagged {', '.join(one.flagged) or 'none'} in {one.seconds:.0f} s"
        )
        sys.stdout.flush()
    if given.out.with_suffix(".md").exists():
        print(given.out.with_suffix(".md").read_text(), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
