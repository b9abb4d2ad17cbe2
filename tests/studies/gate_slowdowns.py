"""Shows the gate code that became slower for a real reason: one edit of the package each, base against head.

Each gate is a line of OUT.jsonl, from which OUT.md is made; stopped, the same command goes on where it was.

    python tests/studies/gate_slowdowns.py --out reports/reference/gate/slowdowns
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tabulate import tabulate

from sasa_bench.gate import run as gate
from sasa_bench.gate.arms import PACKAGE, set_up
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.verdicts import FAILING, Rules
from sasa_bench.suite import load
from sasa_bench.timing.probe import available_cores

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SlowDown:
    """An edit that makes `impl` slower: `old` in `file` of the package becomes `new`."""

    words: str
    impl: str
    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Edit a copy of the package. Raises ValueError where the text has changed since this was written."""
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        if self.old not in text:
            raise ValueError(f"{self.file} no longer holds {self.old!r}: write the slow-down {self.words!r} anew")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


SLOW_DOWNS = (
    SlowDown(
        "unfold copies its windows once more",
        "unfold",
        "impls/unfold.py",
        "F.unfold(t, (window.rows, window.columns), padding=window.radii)\n",
        "F.unfold(t, (window.rows, window.columns), padding=window.radii).clone()\n",
    ),
    SlowDown(
        "fused is built without vector instructions", "fused", "impls/_native.py", "or runnable[0]", 'or "portable"'
    ),
    SlowDown(
        "the convolution leaves oneDNN",
        "conv3x3",
        "impls/convolution.py",
        "    return lambda: F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)",
        "    import torch\n\n"
        "    def off_the_fast_path():\n"
        "        with torch.backends.mkldnn.flags(enabled=False):\n"
        "            return F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)\n\n"
        "    return off_the_fast_path",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a gate said. slower, worse: cases flagged by time, by an exact figure; others: flagged, but not slowed."""

    words: str
    verdict: str
    cases: int
    slower: int
    worse: int
    others: list[str]
    least_ratio: float | None
    seconds: float
    at: str


def gated(slow_down: SlowDown, points: list[Point], budget_s: float) -> Outcome:
    """Gate the package as it is against the package with the edit."""
    with tempfile.TemporaryDirectory(prefix="gate-slowdowns-") as scratch:
        edited = Path(scratch) / "edited"
        shutil.copytree(ROOT / PACKAGE, edited / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        slow_down.apply(edited / PACKAGE)
        result = gate.run(set_up(str(ROOT), str(edited), Path(scratch) / "gate"), points, Rules(), budget_s, 120.0)
    own = {point.key for point in points if point.impl == slow_down.impl}
    flagged = [case for case in result.cases if case.verdict in FAILING]
    ratios = [case.ratio for case in flagged if case.key in own and case.ratio is not None]
    return Outcome(
        slow_down.words,
        result.verdict,
        len(own),
        len(ratios),
        sum(case.key in own and case.ratio is None for case in flagged),
        [case.key for case in flagged if case.key not in own],
        min(ratios, default=None),
        round(result.spent_s, 1),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def table(done: list[Outcome]) -> str:
    """Markdown, a line for each gate."""
    shown = [
        {
            "what made head slower": one.words,
            "verdict": one.verdict,
            "cases": one.cases,
            "found by time": one.slower,
            "by an exact figure": one.worse,
            "other cases flagged": len(one.others),
            "least slow-down found by time": "" if one.least_ratio is None else f"{one.least_ratio - 1:.0%}",
            "minutes": f"{one.seconds / 60:.1f}",
        }
        for one in done
    ]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def main() -> int:
    """Gate what is missing, append, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports/reference/gate/slowdowns")
    parser.add_argument("--suite", type=Path, default=ROOT / "suites/gate.toml")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds a gate may take")
    given = parser.parse_args()
    journal = given.out.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    done = [Outcome(**json.loads(line)) for line in lines]
    suite = load(given.suite)
    points = [
        Point(impl, case if case.threads else case.with_(threads=available_cores()))
        for impl in suite.impls
        for case in suite.cases
    ]
    for slow_down in SLOW_DOWNS:
        if slow_down.words in {one.words for one in done}:
            continue
        done.append(gated(slow_down, points, given.budget))
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done[-1])) + "\n")
        given.out.with_suffix(".md").write_text(table(done) + "\n", encoding="utf-8")
        print(f"{slow_down.words}: {done[-1].verdict} in {done[-1].seconds:.0f} s", flush=True)
    print(table(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
