"""The strongest convolutions: what they are given, what they refuse; that they are right is asked of every one."""

from __future__ import annotations

import pytest
import torch
from agreement import agree

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import leaves, random_tensors

CONVOLUTION = ops.get("convolution")
CASE = Case(channels=16, heads=4, resolution=9)
STRONGEST = ["conv3x3_channels_last", "conv3x3_packed"]


@pytest.mark.parametrize("name", STRONGEST)
def test_images_go_in_and_come_out_channels_last(name: str) -> None:
    impl = impls.get(name)
    computed = impl.computes(CASE)
    tensors = leaves(random_tensors(CONVOLUTION, computed, 1), computed)
    assert tensors["x"].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = impl.build(computed, tensors)()
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", STRONGEST)
def test_they_are_the_same_convolution_as_the_baseline(name: str) -> None:
    assert impls.get(name).computes(CASE).with_(memory_format="contiguous") == impls.get("conv3x3").computes(CASE)


def test_packed_weights_read_the_images_anew_in_every_call() -> None:
    impl = impls.get("conv3x3_packed")
    computed = impl.computes(CASE)
    tensors = leaves(random_tensors(CONVOLUTION, computed, 1), computed)
    with torch.no_grad():
        call = impl.build(computed, tensors)
        first = call().clone()
        tensors["x"].mul_(2)
        torch.testing.assert_close(call(), 2 * first)


@pytest.mark.parametrize(("changes", "says"), [({"mode": "training"}, "forward only"), ({"device": "cuda"}, "cuDNN")])
def test_packed_weights_are_for_inference_on_the_cpu(changes: dict[str, str], says: str) -> None:
    assert says in (impls.get("conv3x3_packed").supports(CASE.with_(**changes)) or "")


@pytest.mark.parametrize("name", STRONGEST)
def test_stems_are_the_same_function(name: str) -> None:
    agree(name, Case(stem="conv", channels=8, heads=1, resolution="6x8", batch=2))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "name", ["conv3x3_channels_last", pytest.param("conv3x3_packed", marks=pytest.mark.exhaustive)]
)
def test_whole_networks_are_the_same_function(name: str) -> None:
    agree(
        name,
        Case(scope="network", network="resnet26", stem="conv", attention_groups="34", resolution=32, batch=1, heads=8),
    )
