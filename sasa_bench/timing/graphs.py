"""A step as a CUDA graph, which a replay runs again without the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from sasa_bench.timing.timers import Step

WARM_CALLS = 3
"""Calls on a stream of its own before a graph is captured (PyTorch, "CUDA Graphs")."""

SAME = 0.05
"""By how much a replay may differ from the call, relative to its norm: atomic sums in 16 bits do not repeat."""


def capture(step: Step) -> Step:
    """What replays the work that `step` queues, as a CUDA graph.

    Raises RuntimeError where it cannot be captured, or where a replay does not write what the call returns: work that
    ran on another stream is not in the graph.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            step()
    before.wait_stream(stream)
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            kept = step()  # the outputs live in the graph's memory as long as the graph
    except RuntimeError:
        _abandon(before, pool)
        raise
    if not _replay_matches(graph.replay, kept, step()):
        raise RuntimeError("a replay of the captured graph does not write what the call returns")

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay


def _abandon(before: Any, pool: Any) -> None:
    """Undo what a capture that failed leaves behind in torch: its stream, and an allocator that still captures.

    Without that, every later capture and every torch.cuda.empty_cache of this process would fail (torch 2.8 to 2.12).
    """
    torch.cuda.set_stream(before)
    for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # where torch has done it itself
            undo(before.device_index, pool)


def _replay_matches(replay: Callable[[], object], kept: object, expected: object) -> bool:
    """Whether `replay` fills the tensors `kept` with those of `expected`, but for the order of sums."""
    pairs = list(zip(_floating(kept), _floating(expected), strict=True))
    for tensor, _ in pairs:
        tensor.fill_(math.nan)
    replay()
    errors = [float((a.float() - b.float()).norm()) <= SAME * float(b.float().norm()) for a, b in pairs if b.numel()]
    return all(errors)


def _floating(outputs: object) -> list[torch.Tensor]:
    """The tensors of floating-point numbers that a step returned."""
    found = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [one.detach() for one in found if isinstance(one, torch.Tensor) and one.is_floating_point()]
