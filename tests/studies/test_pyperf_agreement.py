"""The study of agreement with pyperf measures both and says how far apart they are."""

from __future__ import annotations

import pyperf_agreement
import pytest


def test_the_ratio_furthest_from_one_decides() -> None:
    pairs = {"a": [(1.0, 1.0), (1.01, 1.0), (9.0, 1.0)], "b": [(2.0, 2.2)] * 7}
    text, worst = pyperf_agreement.table(pairs)
    assert worst == pytest.approx(0.2 / 2.2)
    assert "0.909 (0.909 to 0.909), 7 pairs" in text
    assert len(text.splitlines()) == 2


def test_both_measure_every_call_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyperf")
    monkeypatch.setattr(pyperf_agreement, "SETUP", "import time\n# {threads}\n")
    calls = {"short": "time.sleep(0.002)", "long": "time.sleep(0.012)"}
    pairs = pyperf_agreement.pairs_of_this_process(calls, rounds=2, threads=1)
    assert {name: len(found) for name, found in pairs.items()} == {"short": 2, "long": 2}
    assert all(seconds >= 0.002 for pair in pairs["short"] for seconds in pair)
    assert all(seconds >= 0.012 for pair in pairs["long"] for seconds in pair)
