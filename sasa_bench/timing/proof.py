"""Timings that prove their work: inputs that change between samples, and calls that are judged after the timing.

An implementation that answers from an earlier call, by the address or by the content of its inputs, computes several
calls at once, or is still at work when it returns, would be timed for work that it did not do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, arranged
from sasa_bench.timing.check import Oracle, compare
from sasa_bench.timing.timers import Step, Timer, timer_for

CALLS = 8
"""Calls with new values each, after the timing."""

ATTEMPTS = 10
"""So many times CALLS more calls, beside a busy neighbour, before their times are held against an implementation."""

MOST_TIMES, MOST_MORE_S = 3.0, 5e-5
"""The quickest call with new values may take so many times the median sample, and so much more for timing one call."""


class CheatError(Exception):
    """Calls that did not do the work that was timed; the message says how it showed."""


@dataclass(frozen=True)
class Feed:
    """What changes between samples: the images of a case, unless its graph is recorded once, and the gradient of y.

    targets    name -> the very tensor that the implementation reads
    values     name -> other values for it, which `oracle` judges
    oracle     what is expected of these values
    """

    targets: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    oracle: Oracle

    def vary(self, share: float) -> None:
        """New values in place: the others, scaled by `share`; autograd does not see it."""
        for name, target in self.targets.items():
            target.data.copy_(self.values[name]).mul_(share)


def feed(case: Case, tensors: Mapping[str, Tensor], grad_y: Tensor | None, other: Oracle) -> Feed:
    """The feed of one implementation that was built on `tensors` and `grad_y`; `other` holds the other values."""
    targets = {} if case.mode == "backward" else {name: t for name, t in tensors.items() if name in IMAGES}
    sources = {name: other.tensors[name] for name in targets}
    if grad_y is not None and other.grad_y is not None:
        targets["y"], sources["y"] = grad_y, other.grad_y
    values = {name: arranged(sources[name], case).to(targets[name].detach()) for name in targets}
    return Feed(targets, values, other)


def prove(timer: Timer, step: Step, feed: Feed, samples: Sequence[float]) -> None:
    """Make CALLS calls with new values each and judge the last one; `samples` are the seconds per call to prove.

    Without samples no times are compared: on CUDA a call alone takes the host's time to queue it.

    Raises CheatError where an output stays what it was, or still changes after the call; where every such call takes
    far longer than what was timed; and where the last one is off by more than its budget.
    """
    seconds: list[float] = []
    before: Sequence[Tensor] = ()
    outputs: tuple[Tensor, ...] = ()
    kept: list[Any] = []
    for call in range(CALLS):
        feed.vary(1.0 - call / (2 * CALLS) if call < CALLS - 1 else 1.0)
        seconds.append(timer(lambda: kept.append(step()), 1))
        outputs = kept.pop()
        now = [output.detach().clone() for output in outputs]
        if any(torch.equal(a, b) for a, b in zip(before, now, strict=False) if b.numel() > 1 and b.any()):
            raise CheatError("an output is the same for other inputs: it was computed in an earlier call")
        before = now
    time.sleep(min(1.0, 3 * max(seconds)))
    if not all(_same(a, b.detach()) for a, b in zip(before, outputs, strict=True)):
        raise CheatError("an output changed after the call had returned: the call does not wait for its own threads")
    usual = statistics.median(samples) if samples else math.inf
    for _ in range(ATTEMPTS * CALLS):
        if min(seconds) <= MOST_TIMES * usual + MOST_MORE_S:
            break
        feed.vary(1.0)
        seconds.append(timer(step, 1))
        feed.vary(0.9)
        seconds.append(timer(step, 1))
    if min(seconds) > MOST_TIMES * usual + MOST_MORE_S:
        raise CheatError(
            f"calls with new inputs take {min(seconds):.3g} s or more, {min(seconds) / usual:.3g} times as long as the "
            "timed ones: results of earlier calls were used again"
        )
    verdict = compare(feed.oracle, tuple(before))
    if not verdict.ok:
        raise CheatError(f"after the timing, with other inputs: {verdict.reason}")


def proved(
    found: Mapping[str, dict[str, Any]], device: str, steps: Mapping[str, Step], feeds: Mapping[str, Feed]
) -> dict[str, dict[str, Any]]:
    """The fields `found` of each step; one that has a feed and did not do its work is "wrong" and has no time."""
    rows = dict(found)
    for name in feeds.keys() & steps.keys():
        if samples := rows[name].get("samples_s"):
            try:
                prove(timer_for(device), steps[name], feeds[name], samples if device == "cpu" else ())
            except CheatError as error:
                rows[name] = {"status": "wrong", "reason": str(error)}
    return rows


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
