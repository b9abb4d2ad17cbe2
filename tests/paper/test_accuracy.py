"""The training check: what is drawn from a seed, what the network can see, and what is said of the outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sasa_bench import impls
from sasa_bench.paper.accuracy import POSITIONS, SIDE, Outcome, classifier, digits, interval, sentences, to_csv, train


def outcomes(**accuracies: list[float]) -> list[Outcome]:
    """Networks of each position with these accuracies, seed by seed."""
    return [
        Outcome(position, seed, "made-up", 1, 10, 10, accuracy)
        for position, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_a_clear_order_is_said_to_show_and_its_reverse_to_be_reversed() -> None:
    said = sentences(outcomes(none=[0.7, 0.71, 0.72], absolute=[0.8, 0.81, 0.83], relative=[0.78, 0.8, 0.81]))
    assert "70" in said[0] or "71" in said[0]
    assert "absolute - none" in said[4]
    assert said[4].endswith("shows here")
    assert said[3].endswith("is reversed here")


def test_an_order_within_the_noise_is_said_not_to_show() -> None:
    said = sentences(outcomes(none=[0.7, 0.8], absolute=[0.8, 0.7], relative=[0.75, 0.76]))
    assert said[3].endswith("does not show here")
    assert said[4].endswith("does not show here")


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    assert all(math.isnan(end) for end in interval([0.5]))
    said = sentences(outcomes(none=[0.1], absolute=[0.2], relative=[0.9]))
    assert said[3].endswith("does not show here")


def test_the_interval_holds_the_mean_about_as_often_as_it_claims() -> None:
    draws = np.random.default_rng().normal(0.6, 0.05, (2000, 5))
    held = np.mean([low <= 0.6 <= high for low, high in map(interval, draws)])
    assert 0.93 < held < 0.97


def test_without_positions_the_network_cannot_tell_an_image_from_its_mirror_image() -> None:
    torch.manual_seed(torch.seed())
    x = torch.randn(3, 1, SIDE, SIDE)
    differences = {}
    for position in POSITIONS:
        model = classifier(position, impls.ANYWHERE).eval()
        with torch.no_grad():
            differences[position] = (model(x) - model(x.flip(3))).abs().max().item()
    assert differences["none"] < 1e-4
    assert min(differences["absolute"], differences["relative"]) > 1e-4


def test_a_seed_gives_the_same_network_twice() -> None:
    pytest.importorskip("sklearn")
    images, labels = digits()
    assert images.shape == (1797, 1, SIDE, SIDE)
    assert labels.unique().tolist() == list(range(10))
    runs = [[o for o, _ in zip(train("blocked", 1, 0), range(3), strict=False)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert [o.position for o in runs[0]] == list(POSITIONS)
    assert to_csv(runs[0]).splitlines()[0] == "position,seed,impl,epochs,trained,tested,accuracy"
