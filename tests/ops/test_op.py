from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.ops.local_attention import equal_flops_kernel_size
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import leaves, random_tensors

CONVOLUTION = ops.get("convolution")
CRISS_CROSS = ops.get("criss_cross")
DEPTHWISE_CONVOLUTION = ops.get("depthwise_convolution")
GLOBAL_ATTENTION = ops.get("global_attention")
LOCAL_ATTENTION = ops.get("local_attention")
NON_LOCAL = ops.get("non_local")
SQUEEZE_EXCITATION = ops.get("squeeze_excitation")

OPS = {op.name: op for op in (LOCAL_ATTENTION, GLOBAL_ATTENTION, CONVOLUTION, DEPTHWISE_CONVOLUTION)}
TINY = {"channels": 4, "heads": 2, "resolution": "2x3", "batch": 2, "kernel_size": 3}


def counted(op: str, case: Case) -> int:
    """Multiplies and adds of the definition, one at a time."""
    flops = 0
    queries = itertools.product(range(case.batch), range(case.height), range(case.width))
    window = case.kernel_size**2
    for _ in queries:
        for _channel in range(case.channels):
            if "attention" in op:
                if case.scope == "layer":
                    flops += 3 * 2 * case.channels
                    flops += op == "local_attention" and case.position == "absolute"
                pixels = window if op == "local_attention" else case.height * case.width
                for _pixel in range(pixels):
                    flops += 1 if op == "local_attention" and case.position == "relative" else 0  # k + r
                    flops += 2  # q . k
                    flops += 2  # a v
            else:
                flops += 2 * window * (1 if op.startswith("depthwise") else case.channels)
    return flops


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scope", ["layer", "core"])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_the_formula_equals_a_count_of_every_operation(op: str, scope: str, position: str) -> None:
    case = Case(scope=scope, position=position, **TINY)
    assert ops.get(op).cost(case).flops == counted(op, case)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("scope", ["layer", "core"])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
def test_parameters_and_least_bytes_are_those_of_the_tensors(op: Op, scope: str, position: str, mode: str) -> None:
    case = Case(scope=scope, position=position, mode=mode, dtype="bfloat16", **TINY)
    tensors = random_tensors(op, case, 0)
    inputs = {"x", "q", "k", "v"}
    params = sum(t.numel() for name, t in tensors.items() if name not in inputs)
    everything = sum(t.numel() for t in tensors.values())
    y = case.batch * case.channels * case.height * case.width
    found = op.cost(case)
    assert found.params == params
    passes = {"forward": everything + y, "backward": 2 * everything + y, "training": 2 * everything + 2 * y}
    assert found.min_bytes == 2 * passes[mode]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("op", [CONVOLUTION, DEPTHWISE_CONVOLUTION], ids=lambda op: op.name)
def test_convolutions_agree_with_the_counter_of_torch(op: Op, mode: str) -> None:
    case = Case(mode=mode, **TINY)
    tensors = leaves(random_tensors(op, case, 0), case)
    groups = case.channels // tensors["weight"].shape[1]
    with FlopCounterMode(display=False) as counter:
        y = torch.nn.functional.conv2d(tensors["x"], tensors["weight"], padding=case.radius, groups=groups)
        if mode == "training":
            y.sum().backward()
    if op is DEPTHWISE_CONVOLUTION and mode == "training":
        # torch counts the weight gradient of a grouped convolution as if it were dense; the forward pass is enough.
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.conv2d(tensors["x"], tensors["weight"], padding=case.radius, groups=groups)
        assert 3 * counter.get_total_flops() == op.cost(case).flops
    else:
        assert counter.get_total_flops() == op.cost(case).flops


def test_global_attention_products_agree_with_the_counter_of_torch() -> None:
    case = Case(**TINY)
    tensors = leaves(random_tensors(GLOBAL_ATTENTION, case, 0), case)
    with FlopCounterMode(display=False) as counter:
        GLOBAL_ATTENTION.reference(case, tensors)
    assert counter.get_total_flops() == ops.get("global_attention").cost(case).flops


def test_the_paper_example_of_equal_flops_holds() -> None:
    """A 3 x 3 convolution with 128 channels costs as much as attention with k = 19."""
    assert equal_flops_kernel_size(128) == 19
    convolution = ops.get("convolution").cost(Case(kernel_size=3, channels=128)).flops
    attention = ops.get("local_attention").cost(Case(kernel_size=19, channels=128, position="none")).flops
    assert attention <= convolution < ops.get("local_attention").cost(Case(kernel_size=21, position="none")).flops


PEERS = ("neighborhood_attention", "per_channel_attention", "halo_attention")


def test_the_costs_of_other_functions_count_what_they_compute() -> None:
    case = Case(channels=8, heads=2, kernel_size=3, resolution="4x6", batch=2)
    pixels, window = 2 * 4 * 6, 9
    projections = 6 * 8 * 8 * pixels
    plain = ops.get("per_channel_attention").cost(case.with_(position="none")).flops
    assert plain == projections + 3 * window * 8 * pixels
    assert ops.get("per_channel_attention").cost(case).flops == plain + window * 8 * pixels
    assert (
        ops.get("neighborhood_attention").cost(case.with_(position="none")).flops
        == projections + 4 * window * 8 * pixels
    )
    assert ops.get("halo_attention").cost(case).flops == projections + 5 * (2 + 2) ** 2 * 8 * pixels


MODULES = {op.name: op for op in (SQUEEZE_EXCITATION, NON_LOCAL, CRISS_CROSS)}


def test_every_formula_is_counted_by_hand_here() -> None:
    assert set(ops.BUILTIN) == set(OPS) | set(MODULES) | set(PEERS)


def test_the_modules_added_to_convolutions_count_their_products_and_sums() -> None:
    case = Case(channels=32, heads=1, resolution="3x5", batch=2)
    pixels, scalars = 30, 960
    assert ops.get("squeeze_excitation").cost(case).flops == 2 * scalars + 2 * (2 * 32 * 2 + 2 * 2 * 32)
    with FlopCounterMode(display=False) as counter:
        NON_LOCAL.reference(case, leaves(random_tensors(NON_LOCAL, case, 0), case))
    assert ops.get("non_local").cost(case).flops == counter.get_total_flops() + scalars
    seen = sum(a == i or b == j for i, j, a, b in itertools.product(range(3), range(5), range(3), range(5))) * 2
    projections = pixels * 2 * 32 * (4 + 4 + 32)
    assert ops.get("criss_cross").cost(case).flops == projections + seen * (2 * 4 + 2 * 32) + 2 * scalars


@pytest.mark.parametrize("op", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("channels", [1, 8, 48])
def test_the_parameters_of_a_module_are_those_of_its_tensors(op: Op, channels: int) -> None:
    case = Case(channels=channels, heads=1, resolution=4)
    tensors = random_tensors(op, case, 0)
    assert op.cost(case).params == sum(t.numel() for name, t in tensors.items() if name != "x")


def test_global_cost_grows_with_the_square_of_the_pixels_and_local_cost_does_not() -> None:
    small, large = Case(resolution=56), Case(resolution=112)
    growth = {op: ops.get(op).cost(large).flops / ops.get(op).cost(small).flops for op in ops.BUILTIN}
    assert growth["local_attention"] == 4
    assert 4 < growth["criss_cross"] < 8
    assert growth["non_local"] > 13


@pytest.mark.parametrize("position", ["none", "relative"])
def test_needed_are_the_products_that_lie_inside_the_image(position: str) -> None:
    case = Case(scope="core", position=position, channels=8, heads=2, kernel_size=5, resolution="3x7", batch=3)
    pairs = sum(
        abs(i - a) <= 2 and abs(j - b) <= 2 for i in range(3) for j in range(7) for a in range(3) for b in range(7)
    )
    by_position = 2 * 5 * 8 * 3 * 21 if position == "relative" else 0
    found = LOCAL_ATTENTION.cost(case)
    assert found.needed_flops == 4 * 8 * 3 * pairs + by_position
    assert found.needed_flops < found.flops
    assert CONVOLUTION.cost(case).needed_flops == 2 * 8 * 8 * 3 * pairs
