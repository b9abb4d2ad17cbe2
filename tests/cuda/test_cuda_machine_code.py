"""The compiled kernels against the committed table of what they cost; no device is needed to compile them."""

from __future__ import annotations

import random

import machine_code
import pytest
from machine_code import ARCHITECTURES, TABLE

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda import kernels

SPECIALISATIONS = list(machine_code.specialisations())


def same(row: dict[str, str], arch: str, kernel: str, function: kernels.Function, side: int) -> bool:
    wanted = {"arch": arch, "kernel": kernel, "function": str(function), "image": f"{side}x{side}"}
    return all(row[name] == value for name, value in wanted.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "specialisation", SPECIALISATIONS, ids=lambda item: f"{item[0]} {item[1]} {item[2]}".replace(" ", "-")
)
def test_machine_code_costs_what_the_table_says(specialisation, arch):
    kernel, function, side, tunables = specialisation
    row = machine_code.cost(kernel, function, side, tunables, arch)
    assert row["spill_instructions"] == row["stack_bytes"] == "0"
    shared = kernels.shared_bytes(kernel, function, tunables)
    assert shared - 16 < int(row["shared_bytes"]) <= shared <= kernels.SHARED_LIMIT
    assert tunables.threads * int(row["registers"]) <= kernels.ALL_REGISTERS
    if f"NVRTC {nvrtc.nvrtc_version()};" not in TABLE.read_text():
        pytest.skip(f"no spills; {TABLE.name} holds for another NVRTC than {nvrtc.nvrtc_version()}")
    assert [row] == [known for known in machine_code.read_table() if same(known, arch, kernel, function, side)]


def test_the_table_holds_nothing_else():
    assert len(machine_code.read_table()) == len(SPECIALISATIONS) * len(ARCHITECTURES)


def test_the_table_of_candidates_holds_every_one_and_agrees_with_the_shipped():
    rows = machine_code.read_table(machine_code.EVERY_CANDIDATE)
    every = [
        machine_code.identity(*item, arch)
        for item in machine_code.specialisations(every_candidate=True)
        for arch in ARCHITECTURES
    ]
    assert [{name: row[name] for name in every[0]} for row in rows] == every
    assert TABLE.read_text().splitlines()[0] == machine_code.EVERY_CANDIDATE.read_text().splitlines()[0]
    assert [row for row in rows if row in machine_code.read_table()] == machine_code.read_table()


def test_candidates_drawn_at_random_cost_what_their_table_says():
    rows = machine_code.read_table(machine_code.EVERY_CANDIDATE)
    if f"NVRTC {nvrtc.nvrtc_version()};" not in machine_code.EVERY_CANDIDATE.read_text():
        pytest.skip(f"the table holds for another NVRTC than {nvrtc.nvrtc_version()}")
    for item in random.sample(list(machine_code.specialisations(every_candidate=True)), 3):
        arch = random.choice(ARCHITECTURES)
        assert machine_code.cost(*item, arch) in rows


def test_the_hot_loop_is_found_across_a_branch():
    listing = """
.L_before:
        /*0000*/                   MOV R1, R2 ;
.L_loop:
        /*0010*/                   LDS.128 R4, [R1] ;
        /*0020*/              @P0 BRA `(.L_apart) ;
.L_again:
        /*0030*/                   MUFU.EX2 R2, R2 ;
        /*0040*/              @!P1 BRA `(.L_loop) ;
        /*0050*/                   EXIT ;
.L_apart:
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/                   BRA `(.L_again) ;
"""
    loop = machine_code._hot_loop(listing)
    assert sorted(loop) == ["BRA", "BRA", "BRA", "FFMA", "LDS.128", "MUFU.EX2"]
