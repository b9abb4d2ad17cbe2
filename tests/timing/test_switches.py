"""float32 is float32 unless the case says tf32; on CUDA cuDNN looks for its fastest algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import dtype_of, leaves, step
from sasa_bench.timing import switches
from sasa_bench.timing.check import compare, compute_reference
from sasa_bench.timing.prepared import prepare


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.get_num_threads()
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before[:3]
    torch.set_num_threads(before[3])


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_tf32_is_on_only_where_the_case_says_so_and_the_row_says_it(dtype: str) -> None:
    torch.backends.cudnn.allow_tf32 = True
    row = switches.apply(Case(device="cuda", dtype=dtype, threads=1))
    expected = dtype == "tf32"
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (expected, expected)
    assert row == {"tf32": "on" if expected else "off", "cudnn_benchmark": "on"}
    assert torch.backends.cudnn.benchmark


def test_the_cpu_has_no_such_switches() -> None:
    torch.backends.cudnn.benchmark = True
    assert switches.apply(Case(threads=1)) == {}
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", ["unfold", "conv3x3", "fused"])
def test_tf32_on_the_cpu_is_skipped_with_a_reason(name: str) -> None:
    row = prepare(name, Case(channels=8, heads=2, resolution=6, dtype="tf32", threads=1), 1, lambda stage: None, {}).row
    assert row["status"] == "skipped"
    assert "give dtype=float32, or --device cuda" in row["reason"]


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """`t` in float32 with 10 bits behind the leading one of each significand, to nearest."""
    bits = t.view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("op", ["convolution", "local_attention"])
def test_products_rounded_to_tf32_are_right_in_tf32_and_wrong_in_float32(op: str, mode: str) -> None:
    def verdict(dtype: str, as_tensor_cores: bool) -> Any:
        case = Case(channels=32, heads=2, kernel_size=5, resolution=12, mode=mode, dtype=dtype, threads=1)
        reference = compute_reference(ops.get(op), case, 3)
        tensors = leaves(reference.tensors, case)
        assert all(t.dtype == dtype_of(case) == torch.float32 for t in tensors.values())
        if as_tensor_cores:
            tensors = {name: rounded_to_tf32(t.detach()).requires_grad_(t.requires_grad) for name, t in tensors.items()}
        grad_y = None if reference.grad_y is None else reference.grad_y.float()
        return compare(reference, step(case, lambda: ops.get(op).reference(case, tensors), tensors, grad_y)())

    assert verdict("tf32", True).ok, verdict("tf32", True).reason
    assert verdict("tf32", False).ok
    assert not verdict("float32", True).ok
