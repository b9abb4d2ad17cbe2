"""The compiled Triton kernels against the committed table of what they cost; no device is needed to compile them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'sasa-bench[triton]'")

import machine_code
import triton_code

from sasa_bench.impls.triton import launch

ROWS = machine_code.read_table(triton_code.TABLE)
SPECIALISATIONS = list(triton_code.specialisations())
DRAWN = 2
"""How many of the table's rows are compiled; each takes some seconds."""


def row(kernel, function, side, arch):
    identity = triton_code.identity(kernel, function, side, arch)
    (found,) = [known for known in ROWS if known | identity == known]
    return found


def test_the_table_holds_every_specialisation_and_nothing_else():
    wanted = [triton_code.identity(*item) for item in SPECIALISATIONS]
    assert [{name: found[name] for name in wanted[0]} for found in ROWS] == wanted


FORWARD_ON_NVIDIA = [item for item in SPECIALISATIONS if item[0] == "forward" and item[3] != triton_code.AMD]


@pytest.mark.parametrize("item", FORWARD_ON_NVIDIA, ids=str)
def test_the_forward_does_not_spill_and_keeps_eight_warps_resident(item):
    assert row(*item)["spill_instructions"] == row(*item)["stack_bytes"] == "0"
    assert int(row(*item)["resident_warps"]) >= 8


def test_every_kernel_multiplies_on_tensor_cores():
    assert all(int(found["tensor_core_instructions"]) > 0 for found in ROWS)


def test_specialisations_drawn_at_random_cost_what_their_table_says():
    if f"Triton {triton_code.version()};" not in triton_code.TABLE.read_text():
        pytest.skip(f"the table holds for another Triton than {triton_code.version()}")
    for item in random.sample(SPECIALISATIONS, DRAWN):
        assert triton_code.cost(*item) == row(*item)


@pytest.mark.parametrize("kernel", triton_code.KERNELS)
def test_the_kernels_of_the_second_stage_use_the_matrix_cores_of_amd_without_a_spill(kernel):
    found = row(kernel, *triton_code.SECOND_STAGE, triton_code.AMD)
    assert int(found["tensor_core_instructions"]) > 0
    assert found["spill_instructions"] == found["stack_bytes"] == "0"


@pytest.mark.parametrize("kernel", triton_code.KERNELS)
def test_a_map_of_one_pixel_and_one_head_compiles(kernel):
    """Triton makes constants of sizes that are 1; its interpreter does not."""
    function = triton_code.Function(triton_code.F16, 3, 16, True, False)
    first = launch.CHOICES[0]
    for ones in (("height",), ("width", "heads"), ("height", "width", "heads")):
        assert triton_code.compiled(kernel, function, 1, first, "sm_90", ones).asm["cubin"]


def test_another_choice_of_blocks_drawn_at_random_compiles():
    function, side = triton_code.SECOND_STAGE
    kernel, choice = random.choice(triton_code.KERNELS), random.choice(launch.CHOICES[1:])
    assert triton_code.compiled(kernel, function, side, choice, "sm_90").asm["cubin"]
