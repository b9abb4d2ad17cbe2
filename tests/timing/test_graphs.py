"""CUDA graphs without a device: what is captured, what a replay has to write, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from sasa_bench.timing import graphs


class FakeGraph:
    """A captured graph that computes what it is told to when it is replayed."""

    work: Callable[[], object] = staticmethod(lambda: None)
    undone: ClassVar[list[object]] = []

    def replay(self) -> None:
        FakeGraph.work()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """torch.cuda without a device: streams do nothing, a graph is a FakeGraph."""
    stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda other: nullcontext(),
        "synchronize": lambda: None,
        "graph": lambda graph, **options: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: (0, 1),
        "set_stream": lambda other: FakeGraph.undone.append("stream"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(FakeGraph, "undone", [])
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda device, pool, name=name: FakeGraph.undone.append(name), raising=False
        )
    return FakeGraph


def test_a_capture_that_fails_leaves_the_stream_and_the_allocator_as_they_were(fake: type[FakeGraph]) -> None:
    calls: list[int] = []

    def step() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        if len(calls) > graphs.WARM_CALLS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (torch.zeros(1),)

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(step)
    assert fake.undone == ["stream", "_cuda_endAllocateToPool", "_cuda_releasePool"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("written", "factor", "right"),
    [(2, 2.0, True), (1, 2.0, False), (0, 2.0, False), (2, 3.0, False)],
    ids=["all", "first output only", "nothing", "another value"],
)
def test_a_graph_is_timed_only_where_a_replay_writes_what_the_call_returns(
    fake: type[FakeGraph],
    dtype: torch.dtype,
    written: int,
    factor: float,
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 8, dtype=dtype)
    returned: list[tuple[torch.Tensor, ...]] = []

    def step() -> tuple[torch.Tensor, ...]:
        returned.append((2 * x, 4 * x))
        return returned[-1]

    def work() -> None:
        for output, value in list(zip(returned[graphs.WARM_CALLS], (x, 2 * x), strict=True))[:written]:
            output.copy_(factor * value)

    monkeypatch.setattr(fake, "work", staticmethod(work))
    if not right:
        with pytest.raises(RuntimeError, match="does not write what the call returns"):
            graphs.capture(step)
        return
    replay = graphs.capture(step)
    kept = returned[graphs.WARM_CALLS]
    kept[0].zero_()
    replay()
    assert torch.equal(kept[0], 2 * x)
