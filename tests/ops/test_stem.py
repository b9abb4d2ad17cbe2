from __future__ import annotations

import itertools
import random

import pytest

from sasa_bench import ops
from sasa_bench.case import CHOICES, Case
from sasa_bench.ops.tensors import random_tensors

LOCAL_ATTENTION = ops.get("local_attention")
STEMS = CHOICES["stem"][1:]


def stem_case(stem: str, **changes: object) -> Case:
    return Case(**{"stem": stem, "channels": 8, "heads": 1, "resolution": "6x9", "batch": 2} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("stem", STEMS)
def test_the_cost_of_a_stem_counts_the_parameters_and_bytes_of_its_tensors(stem: str) -> None:
    case = stem_case(stem, channels=random.choice([4, 16, 64]))
    tensors = random_tensors(LOCAL_ATTENTION, case, 0)
    found = LOCAL_ATTENTION.cost(case)
    y = LOCAL_ATTENTION.reference(case, tensors)
    assert found.params == sum(t.numel() for name, t in tensors.items() if name != "x")
    assert found.min_bytes == 4 * (sum(t.numel() for t in tensors.values()) + y.numel())


def test_the_cost_of_an_attention_stem_is_a_count_of_every_operation() -> None:
    case = stem_case("aware_values")
    flops = 0
    for _pixel in itertools.product(range(2), range(6), range(9)):
        flops += 2 * 2 * 3 * 8  # queries and keys
        flops += 4 * (2 * 3 * 8 + 2 * 8)  # four value projections, and their mixture
        for _key in range(16):
            flops += 8 * (1 + 2 + 2)  # k + r, q . k, a v
            flops += 4 * 5  # the softmax of four heads
        flops += 8 * (4 + 1)  # batch norm and relu
    flops += 2 * 2 * 3 * 8 * 16  # the maxima of 2 x 3 blocks
    assert LOCAL_ATTENTION.cost(case).flops == flops


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("size", [(1, 1), (4, 8), (6, 9), (13, 3)])
def test_a_stem_gives_a_quarter_of_the_resolution_upwards(stem: str, size: tuple[int, int]) -> None:
    case = stem_case(stem, resolution=list(size))
    y = LOCAL_ATTENTION.reference(case, random_tensors(LOCAL_ATTENTION, case, 0))
    assert y.shape == (2, 8, -(-size[0] // 4), -(-size[1] // 4))
