"""The compiled kernels against the committed table of what they cost; no device is needed to compile them."""

from __future__ import annotations

import random

import machine_code
import pytest
from machine_code import EVERY_CANDIDATE, TABLE, candidate_rows, identity, shipped_rows

from sasa_bench.impls.cuda import kernels

MOST_WORDS_PER_FMA = 0.40
DRAWN = 8
"""How many rows of each table are compiled anew; each takes about two seconds."""


@pytest.mark.parametrize(("path", "items"), [(TABLE, shipped_rows()), (EVERY_CANDIDATE, candidate_rows())])
def test_the_table_holds_every_row_and_is_of_these_kernels(path, items):
    rows = machine_code.read_table(path)
    wanted = [identity(*item) for item in items]
    assert [{name: row[name] for name in wanted[0]} for row in rows] == wanted
    _, kernel, _ = machine_code.heading().split("; ")
    assert kernel in path.read_text().splitlines()[0], "the kernels changed: python tests/cuda/machine_code.py"


def test_both_tables_are_of_one_compiler_and_agree():
    assert TABLE.read_text().splitlines()[0] == EVERY_CANDIDATE.read_text().splitlines()[0]
    every = machine_code.read_table(EVERY_CANDIDATE)
    names = ("arch", "kernel", "function", "image")
    searched = {tuple(row[name] for name in names) for row in every}
    shipped = [row for row in machine_code.read_table() if tuple(row[name] for name in names) in searched]
    assert len(shipped) == len(searched)
    assert [row for row in every if row in shipped] == shipped


@pytest.mark.parametrize("item", shipped_rows(), ids=str)
def test_a_shipped_kernel_neither_spills_nor_overruns_a_multiprocessor(item):
    kernel, function, _, tunables, _ = item
    (row,) = [known for known in machine_code.read_table() if known | identity(*item) == known]
    assert row["spill_instructions"] == row["stack_bytes"] == "0"
    shared = kernels.shared_bytes(kernel, function, tunables)
    assert shared - 16 < int(row["shared_bytes"]) <= shared <= kernels.SHARED_LIMIT
    assert int(row["threads"]) * int(row["registers"]) <= kernels.ALL_REGISTERS
    if kernel == "forward":
        assert float(row["shared_words_per_fma"]) <= MOST_WORDS_PER_FMA


@pytest.mark.parametrize("path", [TABLE, EVERY_CANDIDATE], ids=lambda path: path.name)
def test_rows_drawn_at_random_cost_what_the_table_says(path):
    items = dict(enumerate(shipped_rows() if path == TABLE else candidate_rows()))
    rows = machine_code.read_table(path)
    same_compiler = path.read_text().startswith(f"# {machine_code.heading()}")
    for number in random.sample(sorted(items), DRAWN):
        found = machine_code.cost(*items[number])
        if same_compiler:
            assert found == rows[number]
        elif path == TABLE:
            assert found["spill_instructions"] == "0"
    if not same_compiler:
        pytest.skip(f"{path.name} holds for another NVRTC; without a spill here too")


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
