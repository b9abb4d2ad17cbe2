from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import agree, drawn

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import output_names
from sasa_bench.timing.budgets import BUDGET_FACTOR, KINK_FACTOR, kinks
from sasa_bench.timing.check import compare, compute_reference, poisoned_memory

CONVOLUTION = ops.get("convolution")
LOCAL_ATTENTION = ops.get("local_attention")

CASE = Case(channels=8, heads=2, kernel_size=3, resolution=6)


@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
def test_the_expected_values_themselves_are_right(mode: str) -> None:
    reference = compute_reference(LOCAL_ATTENTION, CASE.with_(mode=mode), 1)
    assert list(reference.expected) == output_names(CASE.with_(mode=mode), reference.tensors)
    verdict = compare(reference, tuple(reference.expected.values()))
    assert verdict.ok
    assert verdict.max_abs_err == 0


def test_an_error_over_the_budget_is_wrong_and_named() -> None:
    reference = compute_reference(LOCAL_ATTENTION, CASE.with_(mode="training"), 2)
    outputs = {name: value.clone() for name, value in reference.expected.items()}
    outputs["gradient of rel_col"].view(-1)[3] += 2 * reference.budgets["gradient of rel_col"]
    verdict = compare(reference, tuple(outputs.values()))
    assert not verdict.ok
    assert "gradient of rel_col" in verdict.reason
    assert verdict.max_abs_err == pytest.approx(2 * verdict.err_budget)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_value_that_is_not_a_number_is_wrong(poison: float) -> None:
    reference = compute_reference(CONVOLUTION, CASE, 3)
    y = reference.expected["y"].clone()
    y.view(-1)[0] = poison
    verdict = compare(reference, (y,))
    assert not verdict.ok
    assert ("y holds NaN in 1 of its 576 values" in verdict.reason) == math.isnan(poison)


def test_a_wrong_shape_is_wrong() -> None:
    reference = compute_reference(CONVOLUTION, CASE, 3)
    assert "shape" in compare(reference, (reference.expected["y"][:, :-1],)).reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_budget_follows_the_dtype(dtype: str) -> None:
    reference = compute_reference(LOCAL_ATTENTION, CASE.with_(dtype=dtype), 4)
    size = reference.expected["y"].abs().max().item()
    rounding = torch.finfo(getattr(torch, dtype)).eps
    assert BUDGET_FACTOR * rounding * size <= reference.budgets["y"] < 10 * BUDGET_FACTOR * rounding * size


@pytest.mark.parametrize("left_out", [0, 1])
def test_the_gradient_of_a_parameter_may_add_pixels_in_sequence_but_leave_none_out(left_out: int) -> None:
    case = CASE.with_(mode="training", channels=4, resolution="56x112")
    reference = compute_reference(CONVOLUTION, case, random.randrange(1 << 30))
    assert reference.grad_y is not None
    padded = F.pad(reference.tensors["x"], (1, 1, 1, 1)).float()
    arriving = reference.grad_y.float().transpose(0, 1).flatten(1).numpy()[:, left_out:]
    weight = torch.empty(reference.expected["gradient of weight"].shape)
    for row, column in np.ndindex(3, 3):
        x = padded[:, :, row : row + 56, column : column + 112].transpose(0, 1).flatten(1).numpy()[:, left_out:]
        sums = np.add.accumulate(arriving[:, None] * x[None], axis=2)[..., -1]
        weight[:, :, row, column] = torch.from_numpy(sums)
    outputs = reference.expected | {"gradient of weight": weight}
    assert compare(reference, tuple(outputs.values())).ok == (not left_out)


def test_a_gradient_that_jumps_in_one_draw_only_has_the_budget_of_that_draw() -> None:
    """In the last block of a network a single relu tells, and in most draws none changes sides."""
    exact = {name: torch.ones(9, dtype=torch.float64) for name in ("y", "gradient of last", "gradient of first")}
    jumps = iter(random.sample([0.0, 0.0, 0.5], 3))

    def rerun(moved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return exact | {"gradient of last": exact["gradient of last"] + next(jumps)}

    found = kinks(1e-7, {"x": torch.ones(3, dtype=torch.float64)}, exact, rerun, 1)
    assert found["gradient of last"] == pytest.approx(KINK_FACTOR * 0.5)
    assert found["gradient of first"] == pytest.approx(KINK_FACTOR * 0.25)


def test_fresh_memory_is_poisoned_inside_and_not_outside() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("resolution", ["7x1", "1x7", "1x1"])
def test_a_gradient_that_is_0_but_for_rounding_has_the_budget_of_several_draws(resolution: str) -> None:
    """On a map with one column every key has the same column: its embedding moves no weight."""
    case = Case(channels=1, heads=1, kernel_size=3, resolution=resolution, mode="training")
    for _ in range(60):
        agree(random.choice(["naive", "unfold", "blocked"]), case)
        drawn.cache_clear()


def test_a_convolution_may_add_channels_and_places_in_sequence_but_leave_none_out() -> None:
    """As a kernel for channels-last images does, whose inner loop runs over channels."""
    case = Case(channels=512, kernel_size=3, resolution=7, batch=1)
    for left_out in (0, 1):
        reference = compute_reference(CONVOLUTION, case, random.randrange(1 << 31))
        x, weight = reference.tensors["x"].float(), reference.tensors["weight"].float().flatten(1)
        columns = F.unfold(x, 3, padding=1)[0]
        y = torch.zeros(512, 49)
        for column, of_column in zip(columns[left_out:], weight.T[left_out:], strict=True):
            y.addr_(of_column, column)
        assert compare(reference, (y.view(1, 512, 7, 7),)).ok == (not left_out)
