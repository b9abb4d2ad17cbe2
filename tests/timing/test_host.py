"""The processor's time is told apart: the measured processes', other processes', the hypervisor's."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sasa_bench.timing import host
from sasa_bench.timing.host import Reading, between

SPIN = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"


def test_shares_are_those_of_all_processors() -> None:
    before, after = Reading(0.0, 10.0, 1.0, 5.0), Reading(10.0, 22.0, 3.0, 12.0)
    found = between(before, after, processors=2)
    assert (found.stolen, found.others, found.total) == (0.1, 0.25, 0.35)


@pytest.mark.parametrize("after", [Reading(0.0, 0, 0, 0), Reading(5.0, 0.0, 0.0, 9.0)])
def test_counters_that_do_not_move_show_no_disturbance(after: Reading) -> None:
    assert between(Reading(0.0, 0.0, 0.0, 0.0), after, processors=2).total == 0.0


def test_a_process_counts_as_another_until_it_is_one_of_those_measured() -> None:
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.2)
        before = host.read([process.pid]), host.read()
        time.sleep(0.5)
        after = host.read([process.pid]), host.read()
    finally:
        process.kill()
        process.wait()
    known, unknown = (between(b, a) for b, a in zip(before, after, strict=True))
    assert unknown.others > known.others


def test_a_system_without_counters_shows_no_disturbance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path)
    before = host.read()
    assert (before.busy, before.stolen) == (0.0, 0.0)
    assert between(before, host.read()).total == 0.0


def test_steal_is_the_eighth_field_and_other_processors_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = ["cpu 9 9 9 9 9 9 9 9 0 0", *(f"cpu{n} {n}00 0 {n}00 9000 0 0 0 {n}50 0 0" for n in range(4)), "intr 7"]
    (tmp_path / "stat").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: {1, 3})
    found = host.read()
    tick = host.os.sysconf("SC_CLK_TCK")
    assert (found.busy, found.stolen) == (pytest.approx(800 / tick), pytest.approx(500 / tick))
    assert between(Reading(0.0, 0, 0, 0), Reading(1.0, 1.0, 0, 0)).others == 0.5
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: {1, 7})
    assert host.read().stolen == pytest.approx(9 / tick), "of all processors where not all of these are shown"


def test_the_time_of_a_process_is_its_own_and_that_of_children_it_has_waited_for() -> None:
    code = "import time\nwhile time.process_time() < {}: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code.format(0.3)!r}])\n{code.format(0.2)}"
    process = subprocess.Popen([sys.executable, "-c", parent + "\nprint(flush=True); input()"], stdin=-1, stdout=-1)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        times = psutil.Process(process.pid).cpu_times()
        expected = times.user + times.system + times.children_user + times.children_system
        assert host._used_by(process.pid) == pytest.approx(expected, abs=0.05)
        assert expected > 0.45
    finally:
        process.kill()
        process.communicate()
    assert host._used_by(process.pid) == 0.0, "it is gone"


def test_the_name_of_a_program_may_hold_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (a) R (b c) S 1 7 7 0 -1 4194304 1 2 3 4 100 200 300 400 20 0 1 0 9\n")
    monkeypatch.setattr(host, "PROC", tmp_path)
    assert host._used_by(7) == 1000 / host.os.sysconf("SC_CLK_TCK")
