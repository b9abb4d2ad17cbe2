"""What prepare refuses besides wrong results: outputs that were kept, and figures that no row may have."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.results.fields import first_line
from sasa_bench.timing.check import Reference, Verdict, compare
from sasa_bench.timing.prepared import figures_of, prepare

CASE = Case(channels=8, heads=2, resolution=6, kernel_size=3, batch=1, threads=1)


def tried(monkeypatch: pytest.MonkeyPatch, build: Any, case: Case) -> dict[str, Any]:
    made = replace(impls.get("naive"), name="made_up", build=build)
    monkeypatch.setattr(impls, "get", lambda name: made)
    return prepare("made_up", case, 1, lambda stage: None, {}).row


def remembering(case: Case, tensors: Any) -> Any:
    call, kept = impls.registry.get("naive").build(case, tensors), []

    def first_result() -> torch.Tensor:
        if not kept:
            kept.append(call())
        return kept[0]

    return first_result


def in_place(case: Case, tensors: Any) -> Any:
    call = impls.registry.get("naive").build(case, tensors)
    y = torch.empty_like(call())
    return lambda: y.copy_(call())


@pytest.mark.parametrize(
    ("mode", "errors", "status"),
    [
        ("training", [0.9], "ok"),
        ("training", [1.6, 0.9], "ok"),
        ("training", [1.6, 1.1], "wrong"),
        ("training", [9.0], "wrong"),
        ("training", [float("inf")], "wrong"),
        ("forward", [1.6], "wrong"),
    ],
)
def test_gradients_that_chance_may_have_moved_are_judged_once_more_with_other_inputs(
    monkeypatch: pytest.MonkeyPatch, mode: str, errors: list[float], status: str
) -> None:
    seen: list[torch.Tensor] = []

    def judged(reference: Reference, outputs: Any) -> Verdict:
        seen.append(reference.tensors["x"])
        assert compare(reference, outputs).ok, "the outputs are those of the inputs that they are judged by"
        error = errors[len(seen) - 1]
        return Verdict(error, 1.0, "off" if error > 1 else "")

    monkeypatch.setattr("sasa_bench.timing.prepared.compare", judged)
    stem = Case(scope="layer", stem="stand_alone", resolution=16, batch=1, threads=1, mode=mode)
    row = prepare("naive", stem, random.randrange(1 << 30), lambda stage: None, {}).row
    assert (row["status"], len(seen)) == (status, len(errors)), row
    assert len(seen) == 1 or not torch.equal(*seen)


@pytest.mark.parametrize("scope", ["layer", "core"])
def test_a_kernel_that_returns_its_first_result_again_is_wrong(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    row = tried(monkeypatch, remembering, CASE.with_(scope=scope))
    assert (row["status"], "same for another input" in row["reason"]) == ("wrong", True)


def test_a_kernel_that_writes_to_one_buffer_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, in_place, CASE)["status"] == "ok"


@pytest.mark.parametrize(
    ("figures", "kept"),
    [
        ({"tiles": np.int64(3), "gain": np.float32(0.5), "how": "tiled"}, {"tiles": 3, "gain": 0.5, "how": "tiled"}),
        ({}, {}),
    ],
)
def test_figures_become_plain_values(figures: dict[str, Any], kept: dict[str, Any]) -> None:
    found = figures_of(SimpleNamespace(figures=figures))
    assert found == kept
    assert {type(value) for value in found.values()} <= {int, float, str}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"gain": float("nan")}, "gain = nan: give a finite number or text"),
        ({"gain": 1 << 63}, "gain = 9223372036854775808: give a finite number or text"),
        ({"gain": np.float32("inf")}, "gain = inf"),
        ({"gain": torch.ones(2)}, "give a finite number or text"),
        ({"time_median_s": 1.0}, "'time_median_s', which sasa-bench fills itself"),
        ({"build_s": 0.0}, "'build_s', which sasa-bench fills itself"),
    ],
)
def test_figures_that_no_row_may_have_are_an_error_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any], said: str
) -> None:
    def build(case: Case, tensors: Any) -> Any:
        call = impls.registry.get("naive").build(case, tensors)
        call.figures = figures
        return call

    row = tried(monkeypatch, build, CASE)
    assert (row["status"], said in row["reason"]) == ("error", True)


def test_a_reason_is_one_line_without_control_characters() -> None:
    assert first_line(ValueError("\x1b[2Jred\nsecond")) == "ValueError: \\x1b[2Jred"


def test_a_case_whose_figures_no_file_holds_is_skipped() -> None:
    row = prepare("global_attention", CASE.with_(resolution=1 << 20), 1, lambda stage: None, {}).row
    assert (row["status"], row["reason"][:9]) == ("skipped", "too large")
    assert "flops" not in row
