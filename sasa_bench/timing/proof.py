"""Timings that prove their work: inputs that change between samples, and calls that are checked after the timing.

An implementation that answers from an earlier call, by the address or by the content of its inputs, computes several
calls at once, or is still at work when it returns, would be timed for work that it did not do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.ops.tensors import IMAGES, arranged
from sasa_bench.timing import floor
from sasa_bench.timing.check import Reference, by_chance, compare
from sasa_bench.timing.timers import Step, Timer, timer_for

CALLS = 5
"""Calls with new values each, after the timing, whose outputs are compared; two, where five outlast LONG_S."""

MOST_TIMES, MOST_MORE_S = 3.0, 5e-5
"""A call with new values may take so many times the same call again, and so much more for timing one call."""

FREED, HELD = 5, 40
"""Pairs that clear an implementation, and pairs that convict it, whichever is reached first.

A pair is a call with new values and then the same call again. An honest implementation does the same work in both, with
the same pause before: whatever disturbs one of them disturbs the other as often, so that at most half of its pairs look
like a cheat's. It is convicted with a probability of at most 1e-8, however busy the machine is; a cheat that a machine
disturbs in 1 of 100 calls goes free once in 10,000 times."""

LONG_S = 0.5
"""No more calls are made once they take this long together, and pairs that do clear an implementation: no disturbance
makes a call that long by chance."""


class CheatError(Exception):
    """Calls that did not do the work that was timed; the message states how it showed."""


@dataclass(frozen=True)
class Feed:
    """What changes between samples: the images of a case, unless its graph is recorded once, and the gradient of y.

    targets    name -> the very tensor that the implementation reads
    values     name -> other values for it, for which `reference` holds the outputs
    reference  what is expected of these values
    second     gives a feed of further values, for outputs that are wrong by chance
    """

    targets: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    reference: Reference
    second: Callable[[], Feed] | None = None

    def vary(self, share: float) -> None:
        """New values in place: the others, scaled by `share`; autograd does not see it."""
        for name, target in self.targets.items():
            target.data.copy_(self.values[name]).mul_(share)

    def repeat(self) -> None:
        """As much work as `vary`, in memory that no implementation reads: the inputs stay as they are."""
        for name, target in self.targets.items():
            torch.empty_like(target).copy_(self.values[name]).mul_(1.0)


def feed(
    case: Case,
    tensors: Mapping[str, Tensor],
    grad_y: Tensor | None,
    other: Reference,
    second: Callable[[], Feed] | None = None,
) -> Feed:
    """The feed of one implementation that was built on `tensors` and `grad_y`; `other` holds the other values."""
    targets = {} if case.mode == "backward" else {name: t for name, t in tensors.items() if name in IMAGES}
    sources = {name: other.tensors[name] for name in targets}
    if grad_y is not None and other.grad_y is not None:
        targets["y"], sources["y"] = grad_y, other.grad_y
    values = {name: arranged(sources[name], case).to(targets[name].detach()) for name in targets}
    return Feed(targets, values, other, second)


def prove(timer: Timer, step: Step, feed: Feed, timed: bool = True) -> None:
    """Make calls with new values each and check the last one; then, if `timed`, compare the times of pairs.

    On CUDA no times are compared: a call alone takes the host's time to queue it.

    Raises CheatError where an output stays what it was, or still changes after the call; where the last one is off by
    more than its budget; and where calls with new values take far longer than the same calls again.
    """
    before: Sequence[Tensor] = ()
    outputs: tuple[Tensor, ...] = ()
    kept: list[Any] = []
    call, calls, longest = 0, CALLS, 0.0
    while call < calls:
        call += 1
        feed.vary(1.0 if call == calls else 1.0 - call / (2 * CALLS))
        longest = max(longest, timer(lambda: kept.append(step()), 1))
        if CALLS * longest > LONG_S:
            calls = min(calls, call + 1)
        outputs = kept.pop()
        now = [output.detach().clone() for output in outputs]
        if any(torch.equal(a, b) for a, b in zip(before, now, strict=False) if b.numel() > 1 and b.any()):
            raise CheatError("an output is the same for other inputs: it was computed in an earlier call")
        before = now
    time.sleep(min(1.0, 3 * longest))
    if not all(_same(a, b.detach()) for a, b in zip(before, outputs, strict=True)):
        raise CheatError("an output changed after the call had returned: the call does not wait for its own threads")
    verdict = compare(feed.reference, tuple(before))
    if feed.second and by_chance(feed.reference, verdict):
        further = feed.second()
        further.vary(1.0)
        again: Any = step()
        verdict = compare(further.reference, again)
    if not verdict.ok:
        raise CheatError(f"after the timing, with other inputs: {verdict.reason}")
    if timed:
        compare_pairs(timer, step, feed)


def compare_pairs(timer: Timer, step: Step, feed: Feed) -> None:
    """Raise CheatError where calls with new values take far longer than the same calls again."""
    suspect: list[tuple[float, float]] = []
    cleared, cleared_s = 0, 0.0
    while cleared < FREED and cleared_s < LONG_S:
        feed.vary(1.0 - (cleared + len(suspect)) / (2 * (FREED + HELD)))
        new = timer(step, 1)
        feed.repeat()
        again = timer(step, 1)
        if new > MOST_TIMES * again + MOST_MORE_S:
            suspect.append((new, again))
        else:
            cleared, cleared_s = cleared + 1, cleared_s + new + again
        if len(suspect) == HELD:
            new, again = (statistics.median(values) for values in zip(*suspect, strict=True))
            raise CheatError(
                f"a call with new inputs takes {new:.3g} s, the same call again {again:.3g} s: results of earlier "
                "calls are used again"
            )


def proved(
    found: Mapping[str, dict[str, Any]],
    case: Case,
    rows: Mapping[str, dict[str, Any]],
    steps: Mapping[str, Step],
    feeds: Mapping[str, Feed],
    announce: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The fields `found` of each step; one that did not do its work is "wrong" and has no time.

    `rows` are the fields that are known of each, its costs among them. One that has a feed makes more calls; `announce`
    gets its name before.
    """
    proven = dict(found)
    for name, step in steps.items():
        announce(name)
        if samples := proven[name].get("samples_s"):
            try:
                if name in feeds:
                    prove(timer_for(case.device), step, feeds[name], timed=case.device == "cpu")
                require_possible(case, rows[name], statistics.median(samples))
            except CheatError as error:
                proven[name] = {"status": "wrong", "reason": str(error)}
    return proven


def require_possible(case: Case, row: Mapping[str, Any], seconds: float) -> None:
    """Raise CheatError where no processor of this kind does the work of `row`, its costs, in so short a time."""
    units = case.threads
    if case.device == "cuda":
        units = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    least = floor.least_seconds(case, row["needed_flops"], row["min_bytes"], units)
    if seconds < least:
        raise CheatError(
            f"a call takes {seconds:.3g} s, and {row['needed_flops']:.3g} FLOPs and {row['min_bytes']:.3g} bytes take "
            f"{least:.3g} s or more on any processor: the work that was timed is not that of the case"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
