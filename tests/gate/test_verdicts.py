"""The decision of the gate on made-up pairs: what must be found, what must not be flagged, which bounds hold."""

from __future__ import annotations

import math
import statistics
from itertools import combinations_with_replacement
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from sasa_bench.gate.statistics import against_both, detectable, holm, location, lower_bound
from sasa_bench.gate.verdicts import (
    CONTAMINATED,
    EQUIVALENT,
    IMPROVED,
    INCONCLUSIVE,
    MISSING,
    NEW,
    NOT_RUN,
    PASS,
    REGRESSION,
    SKIPPED,
    WRONG,
    CaseVerdict,
    Rules,
    confirm,
    contaminated,
    exact_verdict,
    exit_status,
    needs_more_pairs,
    run_verdict,
    screen,
    skip_unsupported,
)

RULES = Rules()
OK = {
    "status": "ok",
    "reason": "",
    "flops": 1000,
    "params": 10,
    "operator_count": 7,
    "allocated_bytes": 1 << 20,
    "err_budget": 1e-6,
    "budgets": {"y": 1e-6, "gradient of x": 3e-6},
}


def pairs(rng: np.random.Generator, shift: float = 0.0, scatter: float = 0.02, count: int = 31) -> list[float]:
    """Log ratios with heavy tails, as pairs on a shared machine have them."""
    return list(math.log1p(shift) + scatter * rng.standard_t(4, size=count))


@pytest.mark.parametrize(("shift", "verdict"), [(0.10, REGRESSION), (0.0, EQUIVALENT), (-0.10, IMPROVED)])
def test_a_clear_change_is_flagged_and_none_is_not(shift: float, verdict: str) -> None:
    rng = np.random.default_rng()
    found = confirm({"a": pairs(rng, shift, 0.01)}, {"a": pairs(rng, 0, 0.01)}, RULES)["a"]
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(1 + shift, abs=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high


def test_identical_code_is_flagged_no_more_often_than_alpha_allows() -> None:
    rng = np.random.default_rng()
    runs = 300
    false = 0
    for _ in range(runs):
        head = {str(i): pairs(rng) for i in range(5)}
        floor = {str(i): pairs(rng) for i in range(5)}
        false += any(v.verdict == REGRESSION for v in confirm(head, floor, RULES).values())
    assert false <= 6  # alpha is 1 % before the margin makes it rarer still; 6 of 300 has p < 0.04 at 1 %


def test_a_slow_down_within_the_noise_of_the_case_is_not_flagged() -> None:
    rng = np.random.default_rng()
    biased = pairs(rng, 0.04, 0.005)
    assert confirm({"a": pairs(rng, 0.05, 0.005)}, {"a": biased}, RULES)["a"].verdict != REGRESSION


def test_noise_that_hides_a_large_slow_down_is_inconclusive() -> None:
    noisy = statistics.NormalDist(math.log1p(0.05), 0.3)
    head = [noisy.inv_cdf((i + 0.5) / 31) for i in range(31)]
    assert confirm({"a": head}, {"a": pairs(np.random.default_rng(), 0, 0.2)}, RULES)["a"].verdict == INCONCLUSIVE


def test_two_bases_take_a_quarter_of_the_variance_and_none_of_the_slow_down() -> None:
    base, copy, head = np.random.default_rng().standard_normal((3, 20000)) * 0.01
    both = against_both(head + 0.05 - base, copy - base)
    assert np.var(both) == pytest.approx(0.75 * np.var(head - base), rel=0.05)
    assert np.mean(both) == pytest.approx(0.05, abs=0.001)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=31))
def test_the_location_is_the_middle_of_all_averages_of_two(values: list[float]) -> None:
    averages = [(a + b) / 2 for a, b in combinations_with_replacement(values, 2)]
    assert location(values) == pytest.approx(statistics.median(averages), abs=1e-12)


def test_the_location_does_not_follow_outliers() -> None:
    quiet = list(np.random.default_rng().standard_normal(24) * 0.001)
    assert abs(location([*quiet, *[5.0] * 7])) < 0.002


def test_noise_that_only_ever_slows_raises_no_alarm() -> None:
    """Head over both bases leans to one side then, which the signed-rank test does not foresee."""
    rng = np.random.default_rng()
    runs, false = 100, 0
    for _ in range(runs):
        base, copy, head = rng.exponential(0.02, (3, 5, 31))
        found = confirm(
            {str(i): against_both(head[i] - base[i], copy[i] - base[i]) for i in range(5)},
            {str(i): list(copy[i] - base[i]) for i in range(5)},
            RULES,
        )
        false += any(verdict.verdict == REGRESSION for verdict in found.values())
    assert false <= 4


@pytest.mark.parametrize(("shift", "wanted"), [(0.05, True), (-0.05, True), (0.0, False)])
def test_a_suspect_gets_all_its_pairs_where_it_still_looks_changed(shift: float, wanted: bool) -> None:
    ratios = pairs(np.random.default_rng(), shift, 0.004)
    assert needs_more_pairs(ratios[: RULES.look_pairs - 1], RULES)
    assert needs_more_pairs(ratios[: RULES.look_pairs], RULES) == wanted
    assert not needs_more_pairs(ratios, RULES)


def test_a_suspect_too_noisy_to_show_a_slow_down_is_not_let_go() -> None:
    assert needs_more_pairs([0.0, *[0.4 * (-1) ** i for i in range(RULES.look_pairs - 1)]], RULES)


def test_a_suspect_that_was_let_go_is_never_flagged_and_shares_the_level() -> None:
    rng = np.random.default_rng()
    ratios = {"few": pairs(rng, 0.5, 0.001, RULES.confirm_pairs - 1), "all": pairs(rng, 0.5, 0.001)}
    floor = {key: pairs(rng, 0.0, 0.001, len(own)) for key, own in ratios.items()}
    found = confirm(ratios, floor, RULES)
    assert (found["few"].verdict, found["all"].verdict) == (EQUIVALENT, REGRESSION)
    alone = confirm({"all": ratios["all"]}, {"all": floor["all"]}, RULES)["all"]
    assert found["all"].low is not None
    assert alone.low is not None
    assert found["all"].low <= alone.low


def test_the_screen_suspects_the_slow_the_fast_and_the_noisy() -> None:
    rng = np.random.default_rng(3)
    head = {
        "quiet": pairs(rng, 0, 0.002, 7),
        "slow": pairs(rng, 0.05, 0.002, 7),
        "fast": pairs(rng, -0.05, 0.002, 7),
        "noisy": [0.3, -0.3, 0.2, -0.2, 0.0, 0.25, -0.25],
    }
    assert set(screen(head, RULES)) == {"slow", "fast", "noisy"}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.2))
@settings(max_examples=20)
def test_holm_agrees_with_statsmodels(p_values: list[float], alpha: float) -> None:
    """Written out because the library collects garbage in each call, which takes longer than everything else here."""
    with mock.patch("gc.collect"):
        expected = multipletests(p_values, alpha=alpha, method="holm")[0].tolist()
    assert holm(p_values, alpha) == expected


@given(st.lists(st.floats(-1, 1), min_size=9, max_size=31), st.floats(0.001, 0.05))
def test_the_lower_bound_is_a_walsh_average_below_the_median(values: list[float], level: float) -> None:
    bound = lower_bound(values, level)
    assert min(values) <= bound <= statistics.median_high([(a + b) / 2 for a in values for b in values]) or math.isinf(
        bound
    )


@pytest.mark.parametrize("level", [0.01, 0.05])
def test_the_lower_bound_covers_as_often_as_it_says(level: float) -> None:
    rng = np.random.default_rng()
    runs = 600
    missed = sum(lower_bound(list(rng.standard_normal(21)), level) > 0 for _ in range(runs))
    assert binomtest(missed, runs, level, alternative="greater").pvalue > 1e-6


def test_too_few_pairs_have_no_bound() -> None:
    assert lower_bound([0.1, 0.2, 0.3], 0.01) == -math.inf


def test_a_floor_that_differs_contaminates_the_run() -> None:
    rng = np.random.default_rng()
    assert contaminated({"a": pairs(rng), "b": pairs(rng)}, RULES) == ""
    said = contaminated({"a": pairs(rng), "b": pairs(rng, 0.08)}, RULES)
    assert "slower" in said
    assert "b" in said


def test_more_scatter_makes_less_detectable() -> None:
    rng = np.random.default_rng()
    assert detectable(pairs(rng, 0, 0.1), 7, 0.02) > detectable(pairs(rng, 0, 0.001), 7, 0.02) > 0.02


@pytest.mark.parametrize(
    ("base", "head", "verdict", "words"),
    [
        (OK, OK, EQUIVALENT, ""),
        (OK, OK | {"flops": 1001}, REGRESSION, "flops 1,000 -> 1,001"),
        (OK, OK | {"params": 11}, REGRESSION, "params"),
        (OK, OK | {"operator_count": 8}, EQUIVALENT, "operators 7 -> 8"),
        (
            OK,
            OK | {"allocated_bytes": 2 << 20},
            REGRESSION,
            "allocated bytes 1,048,576 -> 2,097,152 (--memory-growth 100 ",
        ),
        (OK, OK | {"budgets": {"y": 2e-6, "gradient of x": 3e-6}}, REGRESSION, "error budget of y"),
        (OK, OK | {"err_budget": 3e-6}, EQUIVALENT, ""),  # another output comes nearest to its budget
        (OK, {name: value for name, value in OK.items() if name != "budgets"}, EQUIVALENT, ""),  # an older revision
        (OK, OK | {"flops": 900, "allocated_bytes": 1 << 19, "operator_count": 3}, EQUIVALENT, ""),
        (OK, {"status": "wrong", "reason": "y is off"}, WRONG, "y is off"),
        (OK, {"status": "error", "reason": "boom"}, MISSING, "boom"),
        (OK, {"status": "timeout", "reason": "slow"}, MISSING, "slow"),
        (OK, None, MISSING, "absent"),
        (None, OK, NEW, "absent in base"),
        ({"status": "error", "reason": "boom"}, OK, NEW, "boom"),
        ({"status": "skipped", "reason": "x"}, {"status": "skipped", "reason": "x"}, NOT_RUN, "neither"),
        (None, None, NOT_RUN, "absent in head"),
        ({"status": "error", "reason": "x"}, {"status": "wrong", "reason": "off"}, WRONG, "off"),
    ],
)
def test_exact_figures_are_compared_exactly(base: object, head: object, verdict: str, words: str) -> None:
    found = exact_verdict("a", base, head, RULES)  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert words in found.reason


TIMED = CaseVerdict("a", EQUIVALENT, ratio=1.0)


@pytest.mark.parametrize(
    ("cases", "contamination", "verdict", "status"),
    [
        ([TIMED], "", PASS, 0),
        ([TIMED, CaseVerdict("b", IMPROVED, ratio=0.8), CaseVerdict("c", NEW)], "", PASS, 0),
        ([TIMED, CaseVerdict("b", REGRESSION, ratio=1.2)], "", REGRESSION, 2),
        ([TIMED, CaseVerdict("b", REGRESSION, ratio=1.2)], "copy differs", CONTAMINATED, 3),
        ([TIMED, CaseVerdict("b", REGRESSION, "flops")], "copy differs", REGRESSION, 2),
        ([TIMED, CaseVerdict("b", MISSING)], "", REGRESSION, 2),
        ([TIMED, CaseVerdict("b", WRONG)], "", REGRESSION, 2),
        ([TIMED, CaseVerdict("b", INCONCLUSIVE, ratio=1.0)], "", INCONCLUSIVE, 3),
        ([TIMED], "copy differs", CONTAMINATED, 3),
        ([], "", INCONCLUSIVE, 3),
        ([CaseVerdict("b", NOT_RUN, "runs in neither arm")], "", INCONCLUSIVE, 3),
        ([TIMED, CaseVerdict("b", NOT_RUN, "runs in neither arm")], "", INCONCLUSIVE, 3),
        ([TIMED, CaseVerdict("b", NOT_RUN), CaseVerdict("c", REGRESSION, ratio=1.2)], "", REGRESSION, 2),
    ],
)
def test_the_verdict_of_the_run_and_its_exit_status(
    cases: list[CaseVerdict], contamination: str, verdict: str, status: int
) -> None:
    assert run_verdict(cases, contamination) == verdict
    assert exit_status(verdict) == status


@pytest.mark.parametrize(
    ("name", "grown", "across"),
    [
        ("allocated_bytes", 2 << 20, EQUIVALENT),
        ("budgets", {"y": 1.0}, EQUIVALENT),
        ("flops", 2000, REGRESSION),
        ("params", 11, REGRESSION),
    ],
)
def test_what_depends_on_the_libraries_is_not_compared_across_them(name: str, grown: object, across: str) -> None:
    assert exact_verdict("a", OK, OK | {name: grown}, RULES).verdict == REGRESSION
    assert exact_verdict("a", OK, OK | {name: grown}, RULES, same_environment=False).verdict == across


def test_memory_that_may_grow_is_no_regression_up_to_there() -> None:
    more = OK | {"allocated_bytes": OK["allocated_bytes"] * 3 // 2}
    assert exact_verdict("a", OK, more, Rules(memory=0.5)).verdict == EQUIVALENT
    assert exact_verdict("a", OK, more, Rules(memory=0.49)).verdict == REGRESSION


def test_a_case_that_ran_in_neither_arm_passes_only_where_that_is_allowed() -> None:
    cases = [TIMED, CaseVerdict("b", NOT_RUN, "runs in neither arm")]
    assert run_verdict(cases, allow_not_run=True) == PASS
    assert run_verdict(cases[1:], allow_not_run=True) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("verdicts", "unchanged", "verdict"),
    [
        ([EQUIVALENT], True, PASS),
        ([EQUIVALENT], False, INCONCLUSIVE),
        ([EQUIVALENT, NOT_RUN], True, INCONCLUSIVE),
        ([EQUIVALENT, INCONCLUSIVE], True, INCONCLUSIVE),
        ([SKIPPED], True, INCONCLUSIVE),
        ([EQUIVALENT, WRONG], True, REGRESSION),
    ],
)
def test_a_run_without_times_passes_only_on_the_same_code(verdicts: list[str], unchanged: bool, verdict: str) -> None:
    cases = [CaseVerdict(str(number), found) for number, found in enumerate(verdicts)]
    assert run_verdict(cases, unchanged=unchanged) == verdict


UNSUPPORTED = {"status": "skipped", "reason": "inference only"}


@pytest.mark.parametrize(
    ("base", "head", "other", "verdict"),
    [
        (UNSUPPORTED, UNSUPPORTED, OK, SKIPPED),
        (UNSUPPORTED, UNSUPPORTED, UNSUPPORTED, NOT_RUN),
        (UNSUPPORTED, UNSUPPORTED | {"reason": "needs a GPU"}, OK, NOT_RUN),
        (UNSUPPORTED, UNSUPPORTED | {"status": "error"}, OK, NOT_RUN),
        (OK, UNSUPPORTED, OK, MISSING),
    ],
)
def test_what_an_implementation_cannot_compute_is_skipped_where_it_runs_other_cases(
    base: dict[str, Any], head: dict[str, Any], other: dict[str, Any], verdict: str
) -> None:
    rows = {
        "base": {"onnx batch=1": base, "onnx batch=2": other},
        "head": {"onnx batch=1": head, "onnx batch=2": other},
    }
    exact = {key: exact_verdict(key, rows["base"][key], rows["head"][key], RULES) for key in rows["base"]}
    found = skip_unsupported(exact, rows["base"], rows["head"])
    assert found["onnx batch=1"].verdict == verdict
    assert run_verdict([found["onnx batch=1"], TIMED]) == (
        PASS if verdict == SKIPPED else run_verdict([exact["onnx batch=1"], TIMED])
    )


def test_a_device_that_is_missing_is_not_run_although_the_implementation_ran_on_another() -> None:
    rows = {"unfold batch=1": OK, "unfold batch=1 device=cuda": {"status": "skipped", "reason": "no CUDA device"}}
    exact = {key: exact_verdict(key, row, row, RULES) for key, row in rows.items()}
    assert skip_unsupported(exact, rows, rows)["unfold batch=1 device=cuda"].verdict == NOT_RUN


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_not_a_number_is_never_judged(poison: float) -> None:
    rng = np.random.default_rng()
    with pytest.raises(ValueError, match="not a number"):
        confirm({"a": [*pairs(rng), poison]}, {"a": pairs(rng)}, RULES)
