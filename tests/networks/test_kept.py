"""What a module keeps between calls is bounded, goes with it, and never comes from a trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sasa_bench import LocalAttention2d, impls
from sasa_bench.case import Case
from sasa_bench.networks import kept
from sasa_bench.networks.attention import KernelAttention
from sasa_bench.networks.kept import Kept

WITH_TABLES = [
    name
    for name in impls.names()
    if (impl := impls.get(name)).core is not None and impl.core.tables is not None and impl.missing() is None
]


def zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=like.dtype)


def test_a_value_is_made_once_for_its_arguments_dtype_and_device() -> None:
    values, like = Kept(), torch.empty(0)
    first = values.get(zeros, like, 5)
    assert values.get(zeros, torch.ones(3), 5) is first
    assert values.get(zeros, like.double(), 5).dtype == torch.float64
    assert values.get(zeros, like, 6).shape == (6,)


def test_what_was_made_first_goes_when_bytes_or_entries_are_too_many() -> None:
    values, like = Kept(), torch.empty(0)
    half = kept.KEPT_BYTES // 8
    for extra in range(4):
        values.get(zeros, like, half - extra)
        assert values.bytes <= kept.KEPT_BYTES
    assert [arguments for _, arguments, *_ in values.values] == [(half - 2,), (half - 3,)]
    assert values.get(zeros, like, 2 * half + 1).numel() == 2 * half + 1
    assert values.bytes == 4 * (2 * half - 5)
    for count in range(3 * kept.KEPT_ENTRIES):
        values.get(zeros, like, count)
    assert len(values.values) == kept.KEPT_ENTRIES


def test_copies_and_pickles_begin_with_nothing() -> None:
    values = Kept()
    values.get(zeros, torch.empty(0), 3)
    for again in (copy.deepcopy(values), pickle.loads(pickle.dumps(values))):
        assert again.bytes == 0
        assert again.get(zeros, torch.empty(0), 3).shape == (3,)


def test_a_table_made_in_inference_mode_serves_training() -> None:
    values, like = Kept(), torch.empty(0)
    with torch.inference_mode():
        table = values.get(zeros, like, 3)
    x = torch.ones(3, requires_grad=True)
    (x * table).sum().backward()
    assert not table.is_inference()


def test_threads_may_share_them() -> None:
    values, like = Kept(), torch.empty(0)
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(lambda n: values.get(zeros, like, n % 61).numel(), range(2000)))
    assert sizes == [n % 61 for n in range(2000)]
    assert len(values.values) <= kept.KEPT_ENTRIES


def test_functions_are_few_since_nobody_sees_what_they_hold() -> None:
    values, like = Kept(), torch.empty(0)

    def closure(count: int, like: Tensor) -> Callable[[], int]:
        return lambda: count

    for count in range(20):
        assert values.get(closure, like, count)() == count
    assert len(values.values) == 4


class Prepared:
    """A kernel that prepares for one case and knows no other size."""

    layer = None

    def attend(self, case: Case) -> Callable[..., Tensor]:
        return lambda q, k, v, rel_row, rel_col: q + k + v


def test_what_was_prepared_goes_with_its_layer() -> None:
    layer = KernelAttention(Prepared(), 4, 3, 2, "none", "mask")
    for side in range(3, 12):
        layer(torch.randn(2, 4, side, 5))
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_of_a_layer_are_few_and_go_with_it(name: str) -> None:
    layer = LocalAttention2d(4, kernel_size=3, heads=2, impl=name)
    for batch in (1, 2):
        for side in range(3, 8):
            layer(torch.randn(batch, 4, side, 9))
    assert len(layer._kept.values) == 5
    tables = [value if isinstance(value, tuple) else (value,) for value in layer._kept.values.values()]
    seen = [weakref.ref(table) for group in tables for table in group if isinstance(table, Tensor)]
    assert seen
    del layer, tables
    gc.collect()
    assert not any(reference() is not None for reference in seen)
