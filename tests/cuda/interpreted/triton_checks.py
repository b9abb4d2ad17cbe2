"""Checks of the Triton kernels in the interpreter; test_triton.py runs them in a process that has it switched on.

Values and gradients against dense attention in float64, and planted bugs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import dense_reference
import interpreter
import pytest
import torch
from dense_reference import Problem

from sasa_bench.impls.triton import launch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SMALL = {"batch": 1, "heads": 1, "height": 3, "width": 9, "kernel_size": 3}

FUNCTIONS = [
    Problem(dtype=dtype, head_width=16, position=position, zero_border=zero, **SMALL)
    for dtype, position, zero in product((F16, BF16, F32), (True, False), (False, True))
]
SIZES = [
    Problem(dtype=dtype, batch=batch, heads=heads, head_width=width, height=high, width=wide, kernel_size=window,
            zero_border=zero)
    for dtype, batch, heads, width, high, wide, window, zero in (
        (F16, 1, 1, 16, 1, 1, 3, False),
        (F16, 1, 1, 16, 1, 1, 3, True),
        (BF16, 3, 1, 8, 7, 1, 5, False),
        (F16, 1, 2, 5, 1, 7, 5, True),
        (F16, 1, 1, 1, 2, 3, 1, False),
        (BF16, 1, 1, 33, 2, 5, 7, False),
        (F16, 1, 1, 64, 2, 3, 7, True),
        (F16, 1, 1, 16, 4, 3, 19, False),
        (BF16, 1, 1, 16, 3, 2, 19, True),
        (F32, 1, 1, 12, 3, 5, 33, False),
        (F16, 2, 2, 16, 5, 5, 7, False),
        (F32, 1, 1, 128, 2, 2, 5, False),
        (F16, 1, 1, 16, 17, 3, 3, False),
    )
]  # fmt: skip


@pytest.mark.parametrize("problem", [*FUNCTIONS, *SIZES], ids=str)
def test_agrees_with_float64(problem):
    assert interpreter.findings(interpreter.launcher(), problem) == []


@pytest.mark.parametrize("tunables", [t for t in launch.CHOICES[1:] if t.rows * t.columns > 16 or t.rows == 4], ids=str)
def test_every_shape_of_block_agrees(tunables):
    problem = Problem(dtype=F16, head_width=8, height=9, width=5, kernel_size=7, heads=1)
    assert interpreter.findings(interpreter.launcher(tunables=tunables), problem) == []


def test_large_logits_do_not_overflow():
    problem = Problem(dtype=F32, head_width=16, **SMALL)
    (q, k, v, rel_row, rel_col), _ = problem.inputs()
    y = torch.full_like(q, float("nan"), memory_format=torch.channels_last)
    log2_sum = torch.empty(1, 1, *q.shape[2:])
    launch.run_forward(interpreter.launcher(), 1e4 * q, k, v, rel_row, rel_col, y, log2_sum, 3, 1, False)
    truth = dense_reference.attention(*(t.double() for t in (1e4 * q, k, v, rel_row, rel_col)), 3, 1, False)
    assert (y - truth).abs().max() < 1e-2  # the logits are near 1e5, where float32 resolves 1e-2


def test_two_runs_give_the_same_bits():
    problem = Problem(dtype=F16, head_width=16, **SMALL)
    first, second = (interpreter.run(interpreter.launcher(), problem)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_interpreter_multiplies_right(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    with interpreter.exact_bfloat16():
        got = interpreter.product(a, b)
    assert (got.double() - a.double() @ b.double()).abs().max() < 1e-5


def test_bfloat16_still_needs_the_repair():
    """Fails once the interpreter multiplies bfloat16 right by itself; then `exact_bfloat16` can go."""
    a = torch.randn(16, 16).bfloat16()
    assert not (interpreter.product(a, a).double() - a.double() @ a.double()).abs().max() < 1e-5


# A window that reaches over the border, two blocks of rows, padded channels and window steps.
PROBLEM = Problem(dtype=F16, batch=1, heads=1, head_width=15, height=3, width=9, kernel_size=5)
SEVERAL = replace(PROBLEM, batch=2, heads=2)


@dataclass(frozen=True)
class Mutant:
    """A text of the kernels, what its first occurrence becomes, and the problem that shows it."""

    name: str
    text: str
    becomes: str
    problem: Problem = PROBLEM


MUTANTS = [
    Mutant("head of the embeddings", "(head * HALF + channel)", "channel", SEVERAL),
    Mutant("halves of a head", "channel - HALF) * K", "channel) * K"),
    Mutant("window one step too wide", "(offset < K)", "(offset <= K)"),
    Mutant("border takes part", "column_inside = ZERO_BORDER | ", "column_inside = True | "),
    Mutant("row of the border takes part", "row_inside = ZERO_BORDER | ", "row_inside = True | "),
    Mutant("halo shifted", "first_x - RADIUS + slot_column", "first_x - RADIUS + slot_column + 1"),
    Mutant("peak left out", "logits * LOG2_E - (peak * LOG2_E)[:, None]", "logits * LOG2_E - (peak * 0)[:, None]"),
    Mutant("sum of one weight", "tl.max(tl.dot(weights, ones", "tl.max(0.5 * tl.dot(weights, ones"),
    Mutant("denominator without the peak", "peak * LOG2_E + log2_total", "log2_total"),
    Mutant("image of the map", "at = image * image_stride", "at = 0 * image_stride", SEVERAL),
    Mutant("store not guarded", "to(y_map.dtype.element_ty), mask=own)", "to(y_map.dtype.element_ty))"),
    Mutant("delta forgotten", "- delta[:, None])", ")"),
    Mutant("rows of the window not moved", "row = step + query_row[:, None]", "row = step + 0 * query_row[:, None]"),
    Mutant("columns of the window not moved", "column = tl.minimum(step + query_column[:, None], COLUMNS - 1)",
           "column = tl.minimum(step + 0 * query_column[:, None], COLUMNS - 1)"),
    Mutant("positions left out of dq", "dq = tl.dot(row_weights, ", "tl.dot(row_weights, "),
    Mutant("only the last block counts", "row_share = tl.dot(tl.trans(q), row_weights, row_share",
           "row_share = tl.dot(tl.trans(q), row_weights, row_share * 0"),
    Mutant("window not mirrored", "down_window = key_row - halo_row + 2 * RADIUS", "down_window = halo_row - key_row"),
    Mutant("key columns not mirrored", "key_column[:, None] - halo_column[None, :] + 2 * RADIUS",
           "halo_column[None, :] - key_column[:, None]"),
    Mutant("query outside the image", "column_inside = within(query_x, width)", "column_inside = query_x < 2 * width"),
    Mutant("delta of the keys forgotten", "- delta[None, :])", ")"),
]  # fmt: skip


def planted(mutant: Mutant, folder):
    source = interpreter.KERNELS.read_text()
    assert mutant.text in source, f"{mutant.text!r} is no longer in the source"
    path = folder / "kernels.py"
    path.write_text(source.replace(mutant.text, mutant.becomes, 1))
    return path


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant, tmp_path):
    assert interpreter.findings(interpreter.launcher(planted(mutant, tmp_path)), mutant.problem)


def test_without_a_bug_the_problems_of_the_planted_ones_show_nothing():
    for problem in (PROBLEM, SEVERAL):
        assert interpreter.findings(interpreter.launcher(), problem) == []
