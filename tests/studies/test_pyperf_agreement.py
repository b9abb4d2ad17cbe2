"""The study of agreement with pyperf measures both and says how far apart they are."""

from __future__ import annotations

from pathlib import Path

import pyperf_agreement
import pytest


def test_the_ratio_furthest_from_one_decides() -> None:
    text, worst = pyperf_agreement.table({"a": [1.0, 1.01, 5.0], "b": [2.0]}, {"a": [1.0], "b": [2.2, 2.2, 9.0]})
    assert worst == pytest.approx(0.2 / 2.2)
    assert "0.909" in text
    assert len(text.splitlines()) == 2


def test_both_measure_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyperf")
    monkeypatch.setattr(pyperf_agreement, "SETUP", "import time\n# {threads}\n")
    monkeypatch.setattr(pyperf_agreement, "CALLS", {"nap": "time.sleep(0.002)"})
    mine, other = pyperf_agreement.ours(1, 0.02)["nap"], pyperf_agreement.by_pyperf("time.sleep(0.002)", 1, tmp_path)
    assert min(mine) >= 0.002
    assert min(other) >= 0.002
