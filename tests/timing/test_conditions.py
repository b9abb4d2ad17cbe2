"""What spoils measurements, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench.timing import host, probe
from sasa_bench.timing.conditions import after, before, busy_now, spoilers
from sasa_bench.timing.host import Reading

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
        ({"etc/ld.so.preload": "/usr/lib/libtcmalloc.so"}, {}, "/etc/ld.so.preload loads /usr/lib/libtcmalloc.so into"),
        ({}, {"ONEDNN_VERBOSE": "1", "MALLOC_CHECK_": "0"}, "ONEDNN_VERBOSE=1: every call prints a line; unset it"),
        ({}, {"OMP_DYNAMIC": "TRUE"}, "OMP_DYNAMIC=TRUE gives a process fewer threads"),
        ({}, {"OMP_PROC_BIND": "close"}, "OMP_PROC_BIND=close binds"),
        ({}, {"GOMP_CPU_AFFINITY": "0-3"}, "GOMP_CPU_AFFINITY=0-3 binds"),
    ],
)
def test_each_thing_that_spoils_is_one_sentence(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], said: str
) -> None:
    (sentence,) = spoilers(machine(tmp_path, QUIET | files), environment)
    assert said in sentence


@pytest.mark.parametrize(("busy", "said"), [(80.5, []), (81.5, ["now other processes take 65% of all cores"])])
def test_a_neighbour_is_seen_before_the_load_shows_it(
    busy: float, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([Reading(100.0, 80.0, 20.0, 1.0, 300.0), Reading(101.0, busy, 20.0, 1.2, 300.5)])
    monkeypatch.setattr(host, "read", lambda: next(readings))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = busy_now(0.0)
    assert len(found) == len(said)
    assert all(sentence.startswith(words) for sentence, words in zip(found, said, strict=True))


PRESSURE = "some avg10=1.00 avg60=12.50 avg300=3.00 total={total}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"


def test_a_run_records_the_machine_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([Reading(100.0, 80.0, 20.0, 1.0, 300.0), Reading(110.0, 90.0, 25.0, 9.0, 305.0)])
    monkeypatch.setattr(host, "read", lambda: next(readings))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    files = QUIET | {
        "proc/pressure/cpu": PRESSURE.format(total=4_000_000),
        "sys/fs/cgroup/cpu.max": "150000 100000",
        "sys/fs/cgroup/cpu.stat": "throttled_usec 1000000",
        f"{CPU}/smt/active": "1",
    }
    began = before("id", machine(tmp_path, files))
    first = began.conditions
    assert (first.governor, first.turbo, first.smt, first.quota, first.load) == ("performance", "off", "on", 1.5, 0.1)
    assert (first.pressure, first.stolen, first.throttled_s) == (0.125, 0.05, 1.0)
    assert first.probe_s is not None
    assert 0 < first.probe_s < 0.1
    later = {
        "proc/pressure/cpu": PRESSURE.format(total=9_000_000),
        "sys/fs/cgroup/cpu.stat": "throttled_usec 1250000",
        "proc/loadavg": "3.00 0 0 1/2 3",
    }
    last = after(began, machine(tmp_path, later))
    assert (last.machine, last.moment, last.load) == ("id", "after", 3.0)
    assert (last.pressure, last.stolen, last.throttled_s) == (0.5, 0.25, 0.25)


def test_what_a_system_does_not_show_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path / "none")
    began = before("id", tmp_path)
    for found in (began.conditions, after(began, tmp_path)):
        shown = {name for name, value in vars(found).items() if value is not None}
        assert shown == {"machine", "moment", "at", "probe_s"}
