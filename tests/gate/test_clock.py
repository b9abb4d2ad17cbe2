"""The gate's own clock inside the worker of an arm."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from sasa_bench.gate import clock


def arm(step: Any) -> SimpleNamespace:
    """A module of an arm that keeps its questions where any revision does, with a clock of its own that lies."""
    asked: list[dict[str, Any]] = []

    def stand(cases: dict[str, list[Any]], seed: int, exact: bool) -> dict[str, Any]:
        asked.append(cases)
        return {key: {"status": "ok"} for key in cases}

    def lies(*arguments: Any) -> float:
        return 1e-9

    turns = {"loaded": dict, "stand": stand, "calibrate": lies, "block": lies}
    return SimpleNamespace(TURNS=turns, _use=lambda key: SimpleNamespace(step=step), asked=asked)


def test_blocks_are_timed_by_the_gate_and_not_by_the_arm() -> None:
    blocks = arm(lambda: time.sleep(0.002))
    clock.take_over(blocks)
    assert blocks.TURNS["stand"](cases={"a": ["unfold", {}]}, seed=1, exact=False) == {"a": {"status": "ok"}}
    assert blocks.asked == [{"a": ["unfold", {}]}]
    count, fastest = blocks.TURNS["calibrate"](keys=["a"], block_s=0.01)["a"]
    assert 1 <= count <= 5
    assert fastest >= 0.002
    assert blocks.TURNS["block"](key="a", count=3, spin_s=0.0) >= 0.002
    assert blocks.TURNS["block"](key="a", count=3, spin_s=0.004) >= 0.006


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = arm(lambda: None)
    clock.take_over(blocks)
    blocks.TURNS["stand"](cases={"a": ["unfold", {}]}, seed=1, exact=False)
    monkeypatch.setattr(clock, "_now", lambda: 1.0)
    with pytest.raises(RuntimeError, match="did not move"):
        blocks.TURNS["calibrate"](keys=["a"], block_s=0.01)
