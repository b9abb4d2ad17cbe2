"""Tunables chosen by measurement on the device at hand, remembered on disk until the kernels' source changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from sasa_bench.results.cache import cache_directory, write_atomically

SEARCH_ROUNDS = 5
SEARCH_CALLS = 10

Candidate = TypeVar("Candidate")


def search(
    candidates: Sequence[Candidate], seconds: Callable[[Candidate], float], rounds: int = SEARCH_ROUNDS
) -> tuple[Candidate, list[float]]:
    """Measures candidates in interleaved rounds; returns the one with the smallest median, and all medians.

    Args:
        candidates: what to choose from; on a tie the earlier one wins.
        seconds: runs a candidate and returns its time in seconds. A candidate that raises, because the device or
            the compiler cannot take it, is out and has an infinite median.
        rounds: samples per candidate, after one that is thrown away.

    Raises:
        RuntimeError: no candidate runs; the last candidate's error is its cause.
    """
    samples: list[list[float]] = [[] for _ in candidates]
    failed: dict[int, Exception] = {}
    for number in range(rounds + 1):
        for index, candidate in enumerate(candidates):
            if index in failed:
                continue
            try:
                sample = seconds(candidate)
            except Exception as error:  # those of Triton have no kind in common with those of a driver
                failed[index] = error
                continue
            if number > 0:
                samples[index].append(sample)
    if len(failed) == len(candidates):
        reason = failed[max(failed)]
        raise RuntimeError(f"none of {len(candidates)} candidates runs on this device: {reason}") from reason
    medians = [float("inf") if index in failed else statistics.median(s) for index, s in enumerate(samples)]
    return candidates[medians.index(min(medians))], medians


class TuningStore:
    """Tunables chosen by measurement, one JSON file per device: key -> {"chosen": ..., "seconds": ...}."""

    def __init__(self, device: str) -> None:
        name = "".join(letter if letter.isalnum() else "-" for letter in device)
        self.path = cache_directory() / f"tunables-{name}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything stored; empty when the file is absent or unreadable, for it can be measured again."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def add(self, key: str, chosen: dict[str, int], seconds: float) -> None:
        """Stores one choice; `seconds` is the median time of one launch."""
        entries = self.read() | {key: {"chosen": chosen, "seconds": seconds}}
        write_atomically(self.path, json.dumps(entries, indent=1, sort_keys=True).encode())


class Chooser:
    """Chooses among tunables (dataclasses) for one device and one version of the source.

    Args:
        device: name of the device; each has a file of its own.
        source: text of the kernels; a choice holds for this text alone.
        seconds: measures a callable in seconds of device time.
    """

    def __init__(self, device: str, source: str, seconds: Callable[[Callable[[], None]], float] | None = None) -> None:
        self.store = TuningStore(device)
        self._version = hashlib.sha256(source.encode()).hexdigest()[:12]
        self._seconds = seconds or replay_seconds
        self._chosen: dict[str, Any] = {}

    def choose(self, key: str, candidates: Sequence[Any], run: Callable[[Any], None]) -> Any:
        """The fastest of some tunables for `key`: as stored, else by measuring them once.

        `run` launches a candidate; it is called repeatedly, so it must leave the same results each time and allocate
        nothing. The first candidate is taken unmeasured while a CUDA graph is captured and when SASA_BENCH_TUNE=0.
        """
        if key in self._chosen:
            return self._chosen[key]
        entry = f"{key} source={self._version}"
        stored = self.store.read().get(entry, {}).get("chosen")
        chosen: Any = next((candidate for candidate in candidates if asdict(candidate) == stored), None)
        if chosen is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return candidates[0]
            if len(candidates) == 1 or os.environ.get("SASA_BENCH_TUNE") == "0":
                chosen = candidates[0]
            else:
                chosen, medians = search(candidates, lambda candidate: self._seconds(lambda: run(candidate)))
                with contextlib.suppress(OSError):  # a cache that cannot be written to costs a search in each process
                    self.store.add(entry, asdict(chosen), min(medians))
        self._chosen[key] = chosen
        return chosen


def choosing_in_build(build: Callable[[Any, dict[str, torch.Tensor]], Callable[[], torch.Tensor]]) -> Any:
    """`build` of an implementation, with one pass of the case's mode: compiling and choosing take place there.

    The stage that builds has the long time limit; the one that checks the result does not.
    """

    def built(case: Any, tensors: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        call = build(case, tensors)
        with torch.set_grad_enabled(case.mode != "forward"):
            y = call()
            if case.mode != "forward":
                torch.autograd.grad(y, list(tensors.values()), torch.zeros_like(y))
        return call

    return built


def replay_seconds(run: Callable[[], None]) -> float:
    """Seconds of device time of one call: a graph of SEARCH_CALLS calls, replayed, so that queuing takes no part.

    Captured on a stream of the current device: torch's own for captures belongs to the first device that used it. What
    other threads do meanwhile, such as pinning memory, does not break it.
    """
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        for _ in range(SEARCH_CALLS):
            run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / SEARCH_CALLS
