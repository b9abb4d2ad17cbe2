from __future__ import annotations

import ast
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gate_validation as validation
import other_tools
import pytest
from gate_validation import Comparison, ValidationError

from sasa_bench import impls as registry
from sasa_bench.suite import load

ONE = Comparison(
    *("gate", "two cases", "5 + 21 pairs", 1.0, 0, ["c00", "c01"], [], []), False, 60.0, 1.0, 4, "2026-11-23T00:00:00"
)

PYTEST = """..                                                                       [100%]
--------------------------------------------------------------------------------
ERROR: Performance has regressed:
\ttest_step[c01] (0001_base) - Field 'median' has failed PercentageRegressionCheck: 92.123456789 > 10.000000000
\ttest_step[c03] (0001_base) - Field 'median' has failed PercentageRegressionCheck: 12.000000000 > 10.000000000
--------------------------------------------------------------------------------
"""
ASV = """
| Change   | Before [6f5d7988] <main~1>   | After [d8e0f00d] <main>   |   Ratio | Benchmark (Parameter)        |
|----------|------------------------------|---------------------------|---------|------------------------------|
| +        | 22.8±2μs                     | 15.9±0.6ms                |  694.03 | bench.Suite.time_step('c00') |
| -        | 651±300μs                    | 488±30μs                  |    0.75 | bench.Suite.time_step('c01') |
|          | 651±300μs                    | 650±30μs                  |    1.00 | bench.Suite.time_step('c02') |
| ~        | 651±300μs                    | 951±30μs                  |   ~1.46 | bench.Suite.time_step('c03') |

SOME BENCHMARKS HAVE CHANGED SIGNIFICANTLY.
PERFORMANCE DECREASED.
"""
PYPERF = """c00: Mean +- std dev: [base] 232 us +- 18 us -> [head] 385 us +- 32 us: 1.66x slower
c01: Mean +- std dev: [base] 385 us +- 18 us -> [head] 232 us +- 32 us: 1.66x faster

Benchmark hidden because not significant (2): c02, c03

Geometric mean: 1.10x slower
"""


def test_what_each_tool_says_is_read() -> None:
    names = ["c00", "c01", "c02", "c03"]
    assert other_tools.regressed(PYTEST) == ["c01", "c03"]
    assert other_tools.regressed("2 passed in 3.21s") == []
    assert other_tools.worsened(ASV, names) == ["c00"]
    assert other_tools.slower(PYPERF, names) == ["c00"]


def test_what_benchmatrix_says_is_read_from_its_json() -> None:
    cells = [
        {"case_name": "c00", "regression": "regressed"},
        {"case_name": "c01", "regression": "inconclusive"},
        {"case_name": "c02", "regression": "improved"},
    ]
    said = json.dumps({"comparisons": cells})
    assert other_tools.paired(said, ["c00", "c01", "c02"]) == ["c00"]
    with pytest.raises(ValidationError, match="c03"):
        other_tools.paired(said, ["c00", "c03"])
    cells[1]["regression"] = "not_comparable"
    with pytest.raises(ValidationError, match="c01"):
        other_tools.paired(json.dumps({"comparisons": cells}), ["c00", "c01"])
    with pytest.raises(ValidationError, match="compared nothing"):
        other_tools.paired("error: no such directory", ["c00"])


@pytest.mark.parametrize(("cases", "pairs"), [(1, 6), (2, 8), (3, 12), (4, 8), (6, 12)])
def test_benchmatrix_takes_every_order_of_the_cases_equally_often(cases: int, pairs: int) -> None:
    assert other_tools.planned_pairs(cases) == pairs


def test_a_tool_that_compared_nothing_is_an_error_and_no_pass() -> None:
    with pytest.raises(ValidationError, match="compared nothing"):
        other_tools.regressed("no tests ran")
    with pytest.raises(ValidationError, match="c04"):
        other_tools.worsened(ASV, ["c00", "c04"])
    with pytest.raises(ValidationError, match="c04"):
        other_tools.slower(PYPERF, ["c00", "c04"])


def test_the_table_counts_comparisons_that_flag_identical_code_and_slow_downs_found(tmp_path: Path) -> None:
    done = [
        replace(ONE, repeat=0),
        replace(ONE, repeat=1, flagged=["c01"], red=True),
        replace(ONE, ratio=1.1, slowed=["c00", "c01"], flagged=["c01"], red=True, seconds=180.0),
        replace(ONE, repeat=2, red=True),
        replace(ONE, tool="asv", settings="four rounds", flagged=["c00", "c01"]),
    ]
    validation.write(done, tmp_path / "v")
    with (tmp_path / "v.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tool"] for row in rows] == ["gate", "asv"]
    gate, asv = rows
    # c00 and c01 are slowed in the third one: c01 is found there, and no alarm.
    assert (gate["runs_false"], gate["runs"], gate["slow_downs_found"], gate["slow_downs"]) == ("1", "4", "1", "2")
    # What is inconclusive fails a job without an alarm.
    assert (gate["alike_red"], gate["alike"]) == ("2", "3")
    assert float(gate["minutes_per_comparison"]) == 1.0
    # Clopper-Pearson for no miss in one: 0.025 to 1.
    assert (asv["runs_false"], float(asv["runs_false_low"]), float(asv["runs_false_high"])) == ("1", 0.025, 1.0)
    assert asv["slow_downs_found_low"] == ""
    assert "not measured" in (tmp_path / "v.md").read_text()


def test_a_journal_that_was_cut_off_is_resumed_with_what_is_missing(tmp_path: Path) -> None:
    done = [ONE, replace(ONE, tool="asv")]
    lines = [json.dumps(vars(one)) for one in done]
    (tmp_path / "v.jsonl").write_text("\n".join([*lines, lines[0][:30]]))
    assert validation.read(tmp_path / "v.jsonl") == done
    missing = validation.plan(done, ("gate", "asv"), 2, 1.1)
    assert missing[:2] == [(0, 1.1, "gate"), (0, 1.1, "asv")]
    assert len(missing) == 6
    (tmp_path / "v.jsonl").write_text("hello\n" + lines[0])
    with pytest.raises(ValidationError, match="line 1"):
        validation.read(tmp_path / "v.jsonl")


def test_the_gate_goes_first_in_each_repeat() -> None:
    missing = validation.plan([], validation.TOOLS, 5, 1.1)
    assert [item[2] for item in missing[::5]] == ["gate"] * 10
    assert len(set(missing)) == 50


def test_effort_follows_the_time_that_is_to_be_filled() -> None:
    fixed, seconds, repeated = 10.0, 200.0, 16
    spent = replace(ONE, tool="asv", effort=1.0, seconds=fixed + repeated, repeated=repeated)
    effort = validation.next_effort("asv", [spent], seconds)
    assert effort is not None
    assert math.isclose(fixed + repeated * effort, seconds)
    assert validation.next_effort("asv", [], seconds) is None
    assert validation.next_effort("gate", [replace(ONE, repeated=0)], seconds) is None


def test_comparisons_of_something_else_are_not_added_to_a_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.jsonl").write_text(json.dumps(vars(ONE)) + "\n")
    with pytest.raises(SystemExit):
        validation.main(["--out", str(tmp_path / "v"), "--cases", "2"])
    assert "compares something else (two cases; here 2 cases (" in capsys.readouterr().err
    points = validation.choose(validation.ROOT / "suites" / "gate.toml", 4)
    some, others = dict(list(points.items())[:2]), dict(list(points.items())[2:])
    assert validation.compared(some, 1, 1.1) != validation.compared(others, 1, 1.1)
    assert validation.compared(some, 1, 1.1) == validation.compared(some, 1, 1.1)
    (tmp_path / "v.jsonl").write_text("{}\n{}\n")
    with pytest.raises(SystemExit):
        validation.main(["--out", str(tmp_path / "v"), "--cases", "2"])
    assert "is no comparison: move the file away" in capsys.readouterr().err


def test_cases_are_spread_over_a_suite_and_too_many_are_refused() -> None:
    points = validation.choose(validation.ROOT / "suites" / "gate.toml", 20)
    assert list(points) == [f"c{i:02d}" for i in range(20)]
    assert len({point.key for point in points.values()}) == 20
    assert {point.impl for point in points.values()} == set(load(validation.ROOT / "suites" / "gate.toml").impls)
    assert all(registry.get(point.impl).supports(point.case) is None for point in points.values())
    with pytest.raises(ValidationError, match="--cases 1000"):
        validation.choose(validation.ROOT / "suites" / "gate.toml", 1000)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pytest-benchmark", pytest.param("benchmatrix", marks=pytest.mark.exhaustive)])
def test_a_slow_down_on_purpose_is_found(tmp_path: Path, tool: str) -> None:
    arguments = [
        *("--out", str(tmp_path / "v"), "--repeats", "1", "--cases", "2", "--impl", "unfold", "--slowed", "1"),
        *("--ratio", "20", "--tool", tool, "--seconds", "4"),
    ]
    assert validation.main(arguments) == 0
    slowed, alike = validation.read(tmp_path / "v.jsonl")
    assert (alike.slowed, len(slowed.slowed)) == ([], 1)
    assert set(slowed.slowed) <= set(slowed.flagged)
    assert slowed.red
    before = (tmp_path / "v.jsonl").read_text()
    assert validation.main(arguments) == 0
    assert (tmp_path / "v.jsonl").read_text() == before, "nothing was left to do"


class Clock:
    """Time that passes by a microsecond whenever it is read."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.mark.parametrize("share", [0.05, 0.1, 19.0])
def test_a_step_that_is_slowed_takes_its_share_longer(share: float) -> None:
    """A share of the call's own time behind the call, not from its beginning."""
    (longer,) = (
        part
        for part in ast.parse(other_tools.STEPS).body
        if isinstance(part, ast.FunctionDef) and part.name == "longer"
    )
    clock = Clock()
    names: dict[str, Any] = {"time": clock}
    exec(compile(ast.Module([longer], []), "steps.py", "exec"), names)

    def call() -> None:
        clock.now += 1.0

    names["longer"](call, share)()
    assert clock.now == pytest.approx(1 + share, abs=1e-3)
