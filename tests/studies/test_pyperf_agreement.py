"""The study of agreement with pyperf measures both and says how far apart they are."""

from __future__ import annotations

from pathlib import Path

import pyperf_agreement
import pytest


def test_the_ratio_furthest_from_one_decides() -> None:
    ours = {"a": [[1.0, 1.01, 1.2]] * 3, "b": [[2.0]] * 3}
    others = {"a": [[1.01] * 3] * 3, "b": [[2.2, 2.2, 2.5]] * 3}
    text, worst = pyperf_agreement.table(ours, others)
    assert worst == pytest.approx(0.2 / 2.2)
    assert "0.909 (0.909 to 0.909)" in text
    assert len(text.splitlines()) == 2


def test_both_measure_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyperf")
    monkeypatch.setattr(pyperf_agreement, "SETUP", "import time\n# {threads}\n")
    call = "time.sleep(0.002)"
    mine, other = pyperf_agreement.ours(call, 1, 0.02), pyperf_agreement.by_pyperf(call, 1, tmp_path)
    assert min(mine) >= 0.002
    assert min(other) >= 0.002
