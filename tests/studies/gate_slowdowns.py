"""How many planted slow-downs of the product the gate finds: its mutation score.

Each mutant is one edit of one implementation. A round is a head with one mutant in each of several implementations: its
cases are first measured apart from the gate, on a few fresh pairs, and then gated by the rules of `sasa-bench gate`. A
mutant counts where a case of it takes at least 3 % longer by the former; it is found where the gate flags a case of it,
by time or by an exact figure.

Each measurement is a line of OUT.jsonl, from which OUT.md is made; stopped, the same command goes on where it was.

    python tests/studies/gate_slowdowns.py --out reports/reference/gate/mutants
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gate_mutants import ROUNDS, SlowDown
from tabulate import tabulate

from sasa_bench.gate.arms import Arm, set_up
from sasa_bench.gate.evidence import head_over_both
from sasa_bench.gate.layout import laid_out
from sasa_bench.gate.pairs import Counts, Point, exact_rows, measure_pair
from sasa_bench.gate.relink import LAYOUTS, PAIR
from sasa_bench.gate.run import Gate
from sasa_bench.gate.sources import PACKAGE
from sasa_bench.gate.statistics import location
from sasa_bench.gate.verdicts import FAILING, Rules
from sasa_bench.suite import load
from sasa_bench.timing.probe import available_cores, detect

ROOT = Path(__file__).parents[2]
SLOWER = 0.03
"""By how much a mutant must be slower in one of its cases to count."""
APART = 7
"""Fresh pairs that measure a mutant apart from the gate."""
SHAPES = ((32, 28, 5), (128, 14, 3))
"""channels, resolution, kernel_size of the cases of suites/gate.toml that are taken, in every mode."""


@dataclass(frozen=True)
class Apart:
    """What a mutant costs, measured apart from the gate: case -> head over base. Empty where it does not compute."""

    words: str
    impl: str
    ratios: dict[str, float]
    reason: str
    machine: str
    threads: int
    beside: str
    at: str

    @property
    def counts(self) -> bool:
        """Whether a case is slower by SLOWER."""
        return max(self.ratios.values(), default=0.0) >= 1 + SLOWER


@dataclass(frozen=True)
class Found:
    """What the gate flagged: cases of the mutant by_time and by_figure; others, of implementations without a mutant."""

    words: str
    impl: str
    verdict: str
    cases: int
    by_time: list[str]
    by_figure: list[str]
    others: list[str]
    seconds: float
    machine: str
    threads: int
    beside: str
    layout: str
    at: str

    @property
    def found(self) -> bool:
        """Whether the gate flagged a case of it."""
        return bool(self.by_time or self.by_figure)


def of_impls(points: Sequence[Point], mutants: Sequence[SlowDown]) -> list[Point]:
    """The points of the implementations that the mutants change."""
    changed = {mutant.impl for mutant in mutants}
    return [point for point in points if point.impl in changed]


def arms_of(mutants: Sequence[SlowDown], scratch: Path) -> list[Arm]:
    """Base, head with these edits, and a copy of base."""
    edited = scratch / "edited"
    shutil.copytree(ROOT / PACKAGE, edited / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for mutant in mutants:
        mutant.apply(edited / PACKAGE)
    return set_up(str(ROOT), str(edited), scratch / "gate")


def apart(mutants: Sequence[SlowDown], points: Sequence[Point], about: dict[str, object], kind: str) -> list[Apart]:
    """Each mutant's cases on APART fresh pairs, no decision."""
    with tempfile.TemporaryDirectory(prefix="gate-slowdowns-") as folder:
        arms = arms_of(mutants, Path(folder))
        own = of_impls(points, mutants)
        with laid_out(kind, Path(folder)) as layout:
            rows = list(exact_rows(arms[:2], own, 120.0, layout).values())
            broken = {point.key: rows[1][point.key] for point in own if rows[1][point.key]["status"] != "ok"}
            timed = [point for point in own if all(row[point.key]["status"] == "ok" for row in rows)]
            counts = Counts()
            pairs = [measure_pair(arms, timed, counts, 120.0, layout=layout) for _ in range(APART)]
        ratios = head_over_both(pairs, [point.key for point in timed])
    at = datetime.now(UTC).isoformat(timespec="seconds")
    found = []
    for mutant in mutants:
        keys = [point.key for point in own if point.impl == mutant.impl]
        reasons = [broken[key]["reason"] for key in keys if key in broken and broken[key]["status"] != "skipped"]
        own_ratios = {key: round(math.exp(location(ratios[key])), 4) for key in keys if key in ratios}
        found.append(Apart(mutant.words, mutant.impl, own_ratios, "; ".join(reasons), **about, at=at))  # type: ignore[arg-type]
    return found


def gated(
    mutants: Sequence[SlowDown], points: Sequence[Point], about: dict[str, object], kind: str, budget_s: float
) -> list[Found]:
    """One gate over the cases of these mutants, by the rules of `sasa-bench gate`."""
    own = of_impls(points, mutants)
    with tempfile.TemporaryDirectory(prefix="gate-slowdowns-") as folder:
        result = Gate(arms_of(mutants, Path(folder)), points, Rules(), budget_s, 120.0, layout=kind).run()
    # What is exact counts in a contaminated run too; a time does not.
    flagged = [case for case in result.cases if case.verdict in FAILING and not (result.contaminated and case.ratio)]
    at = datetime.now(UTC).isoformat(timespec="seconds")
    found = []
    for mutant in mutants:
        keys = {point.key for point in own if point.impl == mutant.impl}
        found.append(
            Found(
                mutant.words,
                mutant.impl,
                result.verdict,
                len(keys),
                [case.key for case in flagged if case.key in keys and case.ratio is not None],
                [case.key for case in flagged if case.key in keys and case.ratio is None],
                [case.key for case in flagged if case.key not in {point.key for point in own}],
                round(result.spent_s, 1),
                **about,  # type: ignore[arg-type]
                layout=kind,
                at=at,
            )
        )
    return found


def table(measured: Sequence[Apart], found: Sequence[Found]) -> str:
    """Markdown: the score, then a line for each mutant that was measured both ways."""
    gates = {(one.words, one.impl): one for one in found}
    both = [(one, gates[one.words, one.impl]) for one in measured if (one.words, one.impl) in gates]
    counted = [gate for one, gate in both if one.counts]
    missed = [f"`{gate.impl}`, {gate.words}" for gate in counted if not gate.found]
    score = (
        f"Found: {sum(gate.found for gate in counted)} of {len(counted)} mutants that are {SLOWER:.0%} slower or more."
    )
    lines = [score, f"Not found: {'; '.join(missed) or 'none'}."]
    shown = [
        {
            "implementation": one.impl,
            "mutant": one.words,
            "slowest case, apart": f"{max(one.ratios.values()):.3f}" if one.ratios else one.reason,
            "counts": "yes" if one.counts else "no",
            "found": "yes" if gate.found else "no",
            "cases": gate.cases,
            "by time": len(gate.by_time),
            "by an exact figure": len(gate.by_figure),
            "others flagged": len(gate.others),
            "verdict of the round": gate.verdict,
            "minutes of the round": f"{gate.seconds / 60:.1f}",
            "beside": gate.beside,
        }
        for one, gate in both
    ]
    return "\n\n".join([*lines, tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)])


def main() -> int:
    """Measure what is missing, append, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports/reference/gate/mutants")
    parser.add_argument("--suite", type=Path, default=ROOT / "suites/gate.toml")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds a gate may take")
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--beside", default="idle", help="what else the machine does, in words, for the record")
    parser.add_argument("--relink", default=PAIR, choices=LAYOUTS)
    parser.add_argument("--only", choices=("apart", "gate"), help="one of the two measurements")
    parser.add_argument(
        "--round", type=int, action="append", choices=range(len(ROUNDS)), help="repeatable; default all"
    )
    given = parser.parse_args()
    journal = given.out.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    values = [json.loads(line) for line in lines]
    measured = [Apart(**value["apart"]) for value in values if "apart" in value]
    found = [Found(**value["gate"]) for value in values if "gate" in value]
    suite = load(given.suite)
    threads = given.threads or available_cores()
    points = [
        Point(impl, case.with_(threads=threads))
        for impl in suite.impls
        for case in suite.cases
        if (case.channels, case.resolution, case.kernel_size) in SHAPES
    ]
    about: dict[str, object] = {"machine": detect().hardware_id, "threads": threads}
    about["beside"] = given.beside

    def keep(kind: str, new: Sequence[Apart] | Sequence[Found]) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({kind: asdict(one)}) + "\n" for one in new))
        given.out.with_suffix(".md").write_text(table(measured, found) + "\n", encoding="utf-8")
        print(f"{kind}: {', '.join(one.words for one in new)}", flush=True)

    def missing(mutants: Sequence[SlowDown], done: Sequence[Apart] | Sequence[Found]) -> list[SlowDown]:
        known = {(one.words, one.impl) for one in done}
        return [mutant for mutant in mutants if (mutant.words, mutant.impl) not in known]

    work: list[tuple[str, list[Apart] | list[Found], Callable[[list[SlowDown]], list[Apart] | list[Found]]]] = [
        ("apart", measured, lambda mutants: apart(mutants, points, about, given.relink)),
        ("gate", found, lambda mutants: gated(mutants, points, about, given.relink, given.budget)),
    ]
    for mutants in [ROUNDS[number] for number in given.round or range(len(ROUNDS))]:
        for kind, done, measure in work:
            if given.only in (None, kind) and (left := missing(mutants, done)):
                new = measure(left)
                done += new  # type: ignore[arg-type]
                keep(kind, new)
    print(table(measured, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
