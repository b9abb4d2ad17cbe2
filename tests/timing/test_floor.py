"""No honest time is below the floor, whatever was measured where; a call that does nothing is."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.results.file import read
from sasa_bench.timing.floor import least_seconds
from sasa_bench.timing.proof import CheatError, require_possible

REFERENCE = sorted((Path(__file__).parents[2] / "reports" / "reference").glob("**/*.jsonl"))


def test_no_committed_row_of_any_processor_is_below_the_floor() -> None:
    rows = [row for path in REFERENCE if path.parent.name != "gate" for row in read([path]).rows if row.samples_s]
    assert len(rows) > 200
    for row in rows:
        if row.case.device != "cpu" or row.flops is None or row.min_bytes is None:
            continue
        least = least_seconds(row.case, row.needed_flops or row.flops, row.min_bytes, row.case.threads)
        assert statistics.median(row.samples_s) > least, (row.impl, row.case.describe())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["convolution", "local_attention"])
def test_a_call_that_returns_at_once_is_below_the_floor(op: str, dtype: str) -> None:
    case = Case(channels=256, kernel_size=7, resolution=56, batch=2, dtype=dtype, threads=2)
    cost = ops.get(op).cost(case)
    row = {"needed_flops": cost.needed_flops, "min_bytes": cost.min_bytes}
    with pytest.raises(CheatError, match="the work that was timed is not that of the case"):
        require_possible(case, row, 1e-6)
    require_possible(case, row, cost.flops / 1e11)


def test_more_cores_and_narrower_numbers_allow_less_time() -> None:
    case = Case(threads=1)
    one = least_seconds(case, 10**9, 10**6, 1)
    assert least_seconds(case, 10**9, 10**6, 4) == pytest.approx(one / 4)
    assert least_seconds(case.with_(dtype="bfloat16"), 10**9, 10**6, 1) < one
    assert least_seconds(case, 0, 10**9, 1) > least_seconds(case, 0, 10**6, 1) > 0
