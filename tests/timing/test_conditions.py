"""What spoils measurements, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench.timing import probe
from sasa_bench.timing.conditions import spoilers

CPU = "sys/devices/system/cpu"


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "available_cores", lambda: 4)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


QUIET = {
    "proc/loadavg": "0.10 0.20 0.30 1/200 1234",
    "proc/self/cgroup": "0::/",
    "sys/fs/cgroup/cpu.max": "max 100000",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "performance",
    f"{CPU}/intel_pstate/no_turbo": "1",
    f"{CPU}/smt/active": "0",
}


def test_a_quiet_machine_spoils_nothing(tmp_path: Path) -> None:
    assert spoilers(machine(tmp_path, QUIET), {"OMP_PROC_BIND": "false", "HOME": "/root"}) == []
    assert spoilers(tmp_path / "shows nothing", {}) == []


@pytest.mark.parametrize(
    ("files", "environment", "said"),
    [
        ({"sys/fs/cgroup/cpu.max": "40000 100000"}, {}, "a quota of 0.4 processors"),
        ({f"{CPU}/cpu3/cpufreq/scaling_governor": "powersave"}, {}, "governor powersave"),
        ({f"{CPU}/intel_pstate/no_turbo": "0"}, {}, "turbo is on"),
        ({f"{CPU}/cpufreq/boost": "1"}, {}, "turbo is on"),
        ({f"{CPU}/smt/active": "1"}, {}, "SMT is on"),
        ({"proc/loadavg": "1.70 0 0 1/2 3"}, {}, "load 1.70 on 4 cores"),
        ({}, {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "LD_PRELOAD=/usr/lib/libjemalloc.so.2"),
        ({}, {"OMP_PROC_BIND": "close"}, "OMP_PROC_BIND=close binds"),
        ({}, {"GOMP_CPU_AFFINITY": "0-3"}, "GOMP_CPU_AFFINITY=0-3 binds"),
    ],
)
def test_each_thing_that_spoils_is_one_sentence(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], said: str
) -> None:
    (sentence,) = spoilers(machine(tmp_path, QUIET | files), environment)
    assert said in sentence
