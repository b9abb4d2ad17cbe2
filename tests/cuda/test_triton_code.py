"""The compiled Triton kernels against the committed table of what they cost; no device is needed to compile them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'sasa-bench[triton]'")

import machine_code
import triton_code

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


@pytest.mark.parametrize("item", [item for item in SPECIALISATIONS if item[0] == "forward"], ids=str)
def test_the_forward_does_not_spill_and_keeps_eight_warps_resident(item):
    assert row(*item)["spill_instructions"] == row(*item)["stack_bytes"] == "0"
    assert int(row(*item)["resident_warps"]) >= 8


def test_every_kernel_multiplies_on_tensor_cores():
    assert all(int(found["tensor_core_instructions"]) > 0 for found in ROWS)


def test_specialisations_drawn_at_random_cost_what_their_table_says():
    if triton_code.version() not in triton_code.TABLE.read_text().splitlines()[0]:
        pytest.skip(f"the table holds for another Triton than {triton_code.version()}")
    for item in random.sample(SPECIALISATIONS, DRAWN):
        assert triton_code.cost(*item) == row(*item)


def test_the_forward_compiles_for_amd():
    function, side = triton_code.SECOND_STAGE
    made = triton_code.compiled("forward", function, side, triton_code.launch.CHOICES[0], triton_code.AMD)
    assert "v_mfma" in made.asm["amdgcn"]
