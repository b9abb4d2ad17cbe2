"""Peak memory of one call, its scratch and its output included, and where the figure comes from."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sasa_bench.timing.timers import Step

HIGH_WATER = "high-water mark of resident memory"
T = TypeVar("T")
WITHOUT_GRAPH = ", without what forward saved for backward"
"""Ends the source of a backward pass alone: its graph was recorded before the call."""


def peak_memory(step: Step, device: str) -> tuple[int | None, str]:
    """Bytes in use at the worst moment of one call above what was in use before it, and where the figure comes from.

    On the CPU: the kernel's high-water mark of resident memory, reset before the call, after the heap was trimmed of
    pages it had kept. The call runs in a thread of its own, so that scratch which threads keep from call to call is
    fresh and counts; an output that is the same memory in every call is added. On CUDA: torch's allocator. None where
    the system gives no such figure. Raises what `step` raises.
    """
    if device == "cuda":
        step()  # cuDNN may try algorithms in the first call, with workspaces that no later one needs
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "CUDA allocator"
    first = step()
    try:
        peak, again = _in_a_thread_of_its_own(lambda: _high_water(step))
    except _HiddenError:
        return None, "this system does not show a high-water mark"
    return peak + kept_bytes(first, again), HIGH_WATER


def kept_bytes(first: object, again: object) -> int:
    """Bytes of the outputs that two calls give in the same memory although the first ones are still in use."""
    places = {t.untyped_storage().data_ptr() for t in _tensors(first)}
    found = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in _tensors(again)}
    return sum(size for place, size in found.items() if place in places)


def _tensors(result: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


class _HiddenError(Exception):
    """The system does not show a high-water mark."""


def _high_water(step: Step) -> tuple[int, object]:
    """Bytes of the worst moment of a call above those before it, and what the call gave."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before, _ = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    except (OSError, AttributeError, KeyError) as error:
        raise _HiddenError from error
    result = step()
    return max(0, _status_bytes("VmHWM") - before), result


def _in_a_thread_of_its_own(measure: Callable[[], T]) -> T:
    threads = torch.get_num_threads()
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            torch.set_num_threads(threads)
            torch.ones(1 << 18).add_(1.0)  # starts the threads of its team, which are not part of the call
            found.append(measure())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) * 1024
