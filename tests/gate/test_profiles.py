"""Profiles of flagged cases, base against head: which cases, live arms, and the page that shows them."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import sasa_bench
from sasa_bench.case import Case
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.decision import Result
from sasa_bench.gate.outputs import html
from sasa_bench.gate.pairs import Pair, Point
from sasa_bench.gate.profiles import MOST, Profile, profile, to_profile
from sasa_bench.gate.verdicts import CaseVerdict, Rules
from sasa_bench.profiling.breakdown import Operator
from sasa_bench.profiling.compared import Match

PACKAGE = Path(sasa_bench.__file__).parent
TINY = Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1)


def test_the_slowest_are_profiled_first_then_what_became_faster_and_nothing_else() -> None:
    cases = [CaseVerdict(f"r{i}", "REGRESSION", ratio=1 + i / 100) for i in range(1, MOST)]
    cases += [CaseVerdict("exact", "REGRESSION"), CaseVerdict("fast", "IMPROVED", ratio=0.5)]
    cases += [CaseVerdict("same", "EQUIVALENT", ratio=1.0), CaseVerdict("gone", "MISSING")]
    keys = to_profile(cases)
    assert keys == [f"r{i}" for i in range(MOST - 1, 0, -1)] + ["exact"]
    assert to_profile(cases[-4:]) == ["exact", "fast"]


def test_live_arms_are_profiled_and_an_operator_that_head_adds_is_named(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__"))
    kernel = tmp_path / "sasa_bench/impls/unfold.py"
    edited = kernel.read_text().replace("    keys = windows(k)\n", "    keys = windows(k).cos().acos()\n")
    assert edited != kernel.read_text()
    kernel.write_text(edited)
    (tmp_path / "sasa_bench/impls/convolution.py").unlink()
    arms = [
        Arm("base", PACKAGE.parent, "base", sys.executable),
        Arm("head", tmp_path, "head", sys.executable),
    ]
    points = [Point("conv3x3", TINY), Point("unfold", TINY)]
    missing, found = profile(arms, points, tmp_path / "profiles", 120.0)
    assert missing.reason.startswith("head: ")
    assert (found.key, found.reason) == (points[1].key, "")
    assert {m.name for m in found.matches if m.before is None} >= {"aten::cos", "aten::acos"}
    assert any("are not in base" in sentence for sentence in found.said)
    assert {row["impl"] for row in found.stages} == {"base", "head"}
    assert found.traces is not None
    assert all(path.is_file() for path in found.traces.values())


def test_untimed_cases_of_one_reason_share_a_line_of_what_to_look_at() -> None:
    late = [CaseVerdict(f"unfold kernel_size={k}", "INCONCLUSIVE", "the budget ended") for k in range(3, 23, 2)]
    other = CaseVerdict("blocked kernel_size=3", "NOT RUN", "no such implementation")
    page = html(Result("INCONCLUSIVE", [*late, other], {}, "", [], 60.0, Rules(), [], [], []))
    shown = page.partition("What to look at")[2].partition("</table>")[0]
    assert shown.count("the budget ended") == 1
    assert "<code>unfold kernel_size=3</code> and 9 more, listed below" in shown
    assert "<code>blocked kernel_size=3</code></td>" in shown


def test_the_page_shows_pairs_with_their_bounds_and_each_profile() -> None:
    key = "unfold kernel_size=3 batch=1"
    cases = [
        CaseVerdict(key, "REGRESSION", "slower", ratio=1.1, low=1.08, high=1.12, margin=0.015, seconds=1e-3),
        CaseVerdict("unfold kernel_size=5 batch=1", "EQUIVALENT", ratio=1.0, detectable=0.03),
    ]
    value = math.log(1.1)
    pairs = [("screen", Pair({key: value}, {key: 0.0}, {key: 1e-3}, {key: [value] * 3}, at_s=9.0)) for _ in range(3)]
    pairs += [("confirm", Pair({key: value}, {key: 0.0}, {key: 1e-3}, {key: [value] * 3}, at_s=20.0)) for _ in range(5)]
    before, after = Operator("aten::mul", "8×9", 1, 1e-3, 1e-3), Operator("aten::mul", "8×9", 1, 3e-3, 3e-3)
    stages = [{"impl": arm, "stage": "logits", "ms": 1.0, "share": 1.0} for arm in ("base", "head")]
    traces = {"base": Path("b.json"), "head": Path("h.json")}
    good = Profile(
        key, "", ["`aten::mul` <takes> longer"], [Match("aten::mul", "8×9", before, after)], stages, {}, traces
    )
    result = Result("REGRESSION", cases, {}, "", ["a note"], 60.0, Rules(), pairs, [], [good, Profile("x", "no <way>")])
    page = html(result)
    for words in (
        *("What to look at", "+10.0%", "+8.0% to +12.0%", "a note", "3.0% would have shown"),
        *("<code>unfold kernel_size=3</code>", "All cases: <code>batch=1</code>", "chart-paired-1", "chart-time-1"),
        *("<code>aten::mul</code> &lt;takes&gt; longer", "No profile: no &lt;way&gt;", "+2", "chart-stages-1"),
    ):
        assert words in page, words
    assert "<takes>" not in page
