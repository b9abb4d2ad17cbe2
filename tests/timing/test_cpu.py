"""Samples on the CPU: what runs before each, cold calls, and the fixed work that shows what the host did."""

from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench.timing import cpu, host
from sasa_bench.timing.cpu import Probes
from sasa_bench.timing.settings import Settings

QUICK = Settings(warmup_s=0.001, sample_s=0.0005, budget_s=0.02, least=5, most=9)


def work() -> int:
    return sum(range(2000))


def test_every_step_has_samples_cold_calls_and_what_the_host_did() -> None:
    rows = cpu.sample({"a": work, "b": work}, {}, QUICK)
    for row in rows.values():
        assert len(row["samples_s"]) >= 3
        assert len(row["cold_samples_s"]) == cpu.COLD_CALLS
        assert 0 < row["extra"]["clock"] <= 1
        assert 0 <= row["extra"]["spoiled_samples"] <= len(row["samples_s"])
        assert {"disturbed", "stolen"} <= row["extra"].keys()


def test_each_sample_follows_an_untimed_call_of_its_own() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    cpu.sample(steps, {}, Settings(warmup_s=0, sample_s=1e-9, budget_s=10.0, least=3, most=3))  # type: ignore[arg-type]
    rounds = calls[2 : -2 * cpu.COLD_CALLS]  # a call of each calibrates, and cold ones end it
    assert len(rounds) == 2 * 2 * 3
    assert all(rounds[i] == rounds[i + 1] for i in range(0, len(rounds), 2))


def played(monkeypatch: pytest.MonkeyPatch, probes: list[float], stolen: list[float]) -> Probes:
    seconds, taken = iter([value for value in probes for _ in range(2)]), iter(stolen)
    monkeypatch.setattr(host, "probe", lambda: next(seconds))
    monkeypatch.setattr(host, "stolen_s", lambda: next(taken))
    found = Probes()
    for at in range(len(probes)):
        found.begin("ab"[at % 2])
        assert found.end()
    return found


def test_slow_fixed_work_and_stolen_time_spoil_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    found = played(monkeypatch, [1.0, 1.1, 2.0, 1.1, 1.2, 1.0], [0, 0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5])
    assert found.figures("a") == {"clock": pytest.approx(1 / 1.2), "spoiled_samples": 1}
    assert found.figures("b") == {"clock": pytest.approx(1 / 1.1), "spoiled_samples": 1}


def test_the_last_cache_is_the_largest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(cpu, "CACHES", tmp_path)
    assert cpu.last_cache_bytes() == 32 << 20
    monkeypatch.setattr(cpu, "CACHES", tmp_path / "none")
    assert cpu.last_cache_bytes() == 0
