"""A kernel whose queries see what their windows do not hold is wrong, however large a finite mask is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import Tensors, project
from sasa_bench.timing.check import compute_reference
from sasa_bench.timing.far import error_far_away
from sasa_bench.timing.prepared import prepare

CASE = Case(channels=8, heads=2, resolution="7x6", kernel_size=3, batch=2, threads=1, position="none")


def dense(mask: float, case: Case, tensors: Tensors) -> Callable[[], Tensor]:
    """All pixels against all pixels, `mask` added to the logits outside of the windows."""
    row, column = torch.arange(case.height).repeat_interleave(case.width), torch.arange(case.width).repeat(case.height)
    far = ((row[:, None] - row).abs() > case.radius) | ((column[:, None] - column).abs() > case.radius)

    def call() -> Tensor:
        q, k, v = (t.unflatten(1, (case.heads, -1)).flatten(3).transpose(2, 3) for t in project(case, tensors))
        logits = q @ k.transpose(2, 3) + torch.where(far, mask, 0.0).to(q.dtype)
        return (logits.softmax(3) @ v).transpose(2, 3).flatten(1, 2).unflatten(2, (case.height, case.width))

    return call


def tried(monkeypatch: pytest.MonkeyPatch, mask: float, case: Case) -> dict[str, Any]:
    made = replace(impls.get("naive"), name="made_up", build=partial(dense, mask))
    monkeypatch.setattr(impls, "get", lambda name: made)
    return prepare("made_up", case, 1, lambda stage: None, {}).row


@pytest.mark.parametrize("scope", ["layer", "core"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mask", "status"), [(-1e4, "wrong"), (-1e9, "wrong"), (-math.inf, "ok")])
def test_a_finite_mask_is_wrong(
    monkeypatch: pytest.MonkeyPatch, mask: float, status: str, dtype: str, mode: str, scope: str
) -> None:
    row = tried(monkeypatch, mask, CASE.with_(scope=scope, mode=mode, dtype=dtype))
    assert row["status"] == status, row["reason"]
    assert ("mask with -inf" in row["reason"]) == (status == "wrong")
    assert (row["max_abs_err"] > row["err_budget"]) == (status == "wrong")


def test_images_are_as_before_afterwards() -> None:
    reference = compute_reference(ops.get("local_attention"), CASE, 3)
    tensors = {name: t.clone() for name, t in reference.tensors.items()}
    assert reference.far is not None
    seen = []

    def run() -> tuple[Tensor]:
        seen.append(tensors["x"].abs().max().item())
        return (reference.expected["y"],)

    assert error_far_away(reference.far, reference.expected["y"], 1.0, run, tensors) == (0.0, "")
    assert seen[0] > 1e9
    for name, t in reference.tensors.items():
        assert torch.equal(tensors[name], t)


def test_nothing_is_far_where_every_window_holds_the_pixel_and_for_convolutions() -> None:
    assert compute_reference(ops.get("local_attention"), CASE.with_(kernel_size=13), 4).far is None
    assert compute_reference(ops.get("convolution"), CASE, 4).far is None
    assert compute_reference(ops.get("global_attention"), CASE, 4).far is None
