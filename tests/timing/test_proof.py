"""Kernels that cheat are caught, each by the sentence that belongs to it; honest ones pass."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.timing import proof
from sasa_bench.timing.check import Verdict
from sasa_bench.timing.prepared import prepare
from sasa_bench.timing.process import Request, Worker
from sasa_bench.timing.proof import CheatError, Feed, prove
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import wall_clock

CASE = Case(channels=64, heads=4, kernel_size=7, resolution=28, threads=1)
FILE = """
import threading, time, torch
from dataclasses import replace
from sasa_bench.impls import get
def build(case, tensors):
    call, x, state = get("unfold").build(case, tensors), tensors["x"], {{"calls": 0}}
    {before}
    def wrapped():
        state["calls"] += 1
        {body}
    {after}
    return wrapped
IMPL = replace(get("unfold"), name="{name}", build=build)
"""
CHEATS = {
    "replay_by_pointer": ("", "key = x.data_ptr(); state[key] = state[key] if key in state else call(); "
                          "return state[key]", "", "the same for"),
    "replay_by_checksum": ("", "key = float(x.sum()); y = state.get(key); y = call() if y is None else y; "
                           "state.clear(); state.update({key: y, 'calls': 0}); return y", "", "earlier calls"),
    "several_calls_in_one": ("", "state['y'] = call() if state['calls'] % 16 == 1 else state['y']; return state['y']",
                             "", "the same for"),
    "lazy_tensor": ("class Lazy(torch.Tensor): pass", "return call().as_subclass(Lazy)", "", "is a Lazy"),
    "thread_left_running": (
        "def fill(y):\n        time.sleep(0.02); y.copy_(call())",
        "y = torch.zeros_like(x); t = threading.Thread(target=fill, args=(y,)); t.start(); "
        "state['calls'] < 2 and t.join(); return y", "", ""),
    "lower_precision": ("", "return call().bfloat16().float()", "", "times its budget"),
    "small_factor": ("", "return call() * 1.0005", "", "times its budget"),
    "overwritten_time": ("", "return call()", "wrapped.figures = {'time_median_s': 1e-9}", "time_median_s"),
}  # fmt: skip


def measured(tmp_path: Path, names: list[str], case: Case = CASE) -> dict[str, dict[str, Any]]:
    """Row of each of CHEATS, or of a registered implementation, by name."""
    specs = {}
    for name in names:
        specs[name] = name
        if name in CHEATS:
            before, body, after, _ = CHEATS[name]
            path = tmp_path / f"{name}.py"
            path.write_text(FILE.format(name=name, before=before or "pass", body=body, after=after or "pass"))
            specs[name] = str(path)
    settings = asdict(Settings(warmup_s=0.01, sample_s=0.01, budget_s=0.05, least=3, most=7))
    worker = Worker(120.0)
    try:
        found = dict(worker.measure(Request(case, tuple(specs.values()), 3, settings)))
    finally:
        worker.close()
    return {name: found[spec] for name, spec in specs.items()}


def test_every_cheat_is_caught_and_none_has_a_time(tmp_path: Path) -> None:
    rows = measured(tmp_path, [*CHEATS, "unfold"])
    assert rows["unfold"]["status"] == "ok", rows["unfold"]["reason"]
    for name, (*_, says) in CHEATS.items():
        row = rows[name]
        assert row["status"] in ("wrong", "error"), name
        assert says in row["reason"], (name, row["reason"])
        assert "samples_s" not in row, name


def test_a_clock_that_a_kernel_puts_in_place_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    assert wall_clock(lambda: sum(range(1000)), 10) > 0


@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
@pytest.mark.parametrize("name", [name for name in impls.names() if impls.get(name).info.quick])
def test_every_implementation_follows_its_inputs(name: str, mode: str) -> None:
    case = Case(channels=16, heads=2, kernel_size=3, resolution=9, mode=mode)
    prepared = prepare(name, case, 5, lambda stage: None, {})
    if prepared.row["status"] == "skipped":
        pytest.skip(prepared.row["reason"])
    assert prepared.step is not None, prepared.row
    assert prepared.feed is not None
    with torch.random.fork_rng():
        prove(wall_clock, prepared.step, prepared.feed(), timed=False)


class NoisyMachine:
    """A timer of pairs, new values first: calls of `new_s` and `again_s`, of which a share is disturbed for long."""

    def __init__(self, new_s: float, again_s: float, disturbed: float, seed: int) -> None:
        self.seconds, self.disturbed, self.draw = [new_s, again_s], disturbed, random.Random(seed)

    def __call__(self, step: object, count: int) -> float:
        self.seconds.reverse()
        wait = self.draw.paretovariate(0.7) * 1e-3 if self.draw.random() < self.disturbed else 0.0
        return self.seconds[1] * self.draw.lognormvariate(0.0, 0.2) + wait


def convicted(machine: NoisyMachine) -> bool:
    feed = Feed({}, {}, reference=None)  # type: ignore[arg-type]
    try:
        proof.compare_pairs(machine, lambda: None, feed)
    except CheatError:
        return True
    return False


@pytest.mark.parametrize("call_s", [5e-6, 1e-3, 0.1])
@pytest.mark.parametrize("disturbed", [0.1, 0.5, 0.9])
def test_a_busy_machine_convicts_no_honest_kernel(disturbed: float, call_s: float) -> None:
    assert not any(convicted(NoisyMachine(call_s, call_s, disturbed, seed)) for seed in range(1000))


@pytest.mark.parametrize("call_s", [1e-4, 1e-2])
def test_a_busy_machine_clears_no_cheat(call_s: float) -> None:
    assert sum(convicted(NoisyMachine(call_s, 5e-6, 0.01, seed)) for seed in range(200)) >= 199


@pytest.mark.parametrize(("errors", "right"), [([1.6, 0.9], True), ([1.6, 1.1], False), ([9.0], False)])
def test_gradients_that_are_off_by_chance_after_the_timing_are_judged_once_more(
    monkeypatch: pytest.MonkeyPatch, errors: list[float], right: bool
) -> None:
    case = Case(scope="network", network="resnet26", stem="conv", attention_groups="1234", mode="training")
    first, further = (SimpleNamespace(case=case, of=n) for n in range(2))
    x, seen = torch.zeros(3), []

    def judged(reference: Any, outputs: Any) -> Verdict:
        seen.append((reference.of, outputs[0].sum().item()))
        return Verdict(errors[len(seen) - 1], 1.0, "off" if errors[len(seen) - 1] > 1 else "")

    monkeypatch.setattr(proof, "compare", judged)
    fed = [Feed({"x": x}, {"x": torch.full((3,), value)}, of) for value, of in ((1.0, first), (2.0, further))]  # type: ignore[arg-type]
    feed = replace(fed[0], second=lambda: fed[1])
    with nullcontext() if right else pytest.raises(CheatError, match="after the timing"):
        prove(wall_clock, lambda: (x * 2,), feed, timed=False)
    assert seen == [(0, 6.0), (1, 12.0)][: len(errors)]


def test_the_implementation_whose_call_fails_in_the_proof_is_the_one_announced() -> None:
    """So that no other one of the case gets its error, or its time limit."""

    class Failing:
        def vary(self, share: float) -> None:
            raise RuntimeError("it takes no other inputs")

    found = {name: {"samples_s": [0.01]} for name in ("first", "second", "third")}
    rows = {name: {"needed_flops": 1, "min_bytes": 1} for name in found}
    steps = dict.fromkeys(found, lambda: torch.zeros(1))
    announced: list[str] = []
    with pytest.raises(RuntimeError, match="no other inputs"):
        proof.proved(found, CASE, rows, steps, {"second": Failing()}, announced.append)  # type: ignore[arg-type, dict-item]
    assert announced == ["first", "second"]
