"""The limits of a container, from made-up folders of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench.timing import limits, probe
from sasa_bench.timing.limits import cpu_quota, memory_limit


def groups(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """(mount point, what /proc/self/cgroup says) with these files below the mount point."""
    for name, text in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (root / "own").write_text(own)
    return root / "mount", root / "own"


OURS = "cpu,cpuacct/docker/a/cpu"
VERSION_1 = "9:name=systemd:/\n4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "40000 100000"}, 0.4),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/only/outside\n", {"cpu.max": "40000 100000"}, 0.4),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        (VERSION_1, {f"{OURS}.cfs_quota_us": "50000", f"{OURS}.cfs_period_us": "100000"}, 0.5),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_is_the_tightest_of_a_group_and_those_above(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(*groups(tmp_path, own, files)) == quota


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/a\n", {"a/memory.max": str(3 << 30)}, 3 << 30),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        (VERSION_1, {"memory/memory.limit_in_bytes": str(2 << 30)}, 2 << 30),
        (VERSION_1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_the_memory_limit_is_that_of_the_group(
    tmp_path: Path, own: str, files: dict[str, str], limit: int | None
) -> None:
    assert memory_limit(*groups(tmp_path, own, files)) == limit


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (0.4, 1), (2.5, 2), (64.0, 8)])
def test_threads_are_what_the_quota_pays_for(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota)
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert probe.available_cores() == cores


def test_a_machine_says_what_its_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_quota", lambda: None)
    free = probe.detect()
    monkeypatch.setattr(limits, "cpu_quota", lambda: 0.4)
    monkeypatch.setattr(limits, "memory_limit", lambda: 700 << 20)
    held = probe.detect()
    assert (held.cpu_quota, held.cores, held.memory_bytes) == (0.4, 1, 700 << 20)
    assert held.hardware_id != free.hardware_id
    assert type(held).from_dict(held.to_dict()) == held


@pytest.mark.parametrize(
    ("own", "files", "seconds"),
    [
        ("0::/\n", {"cpu.stat": "usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000"}, 2.5),
        (VERSION_1, {"cpu/cpu.stat": "nr_periods 9\nthrottled_time 1500000000"}, 1.5),
        ("0::/\n", {"cpu.stat": "usage_usec 5"}, None),
        ("", {}, None),
    ],
)
def test_the_time_that_a_quota_took_is_read(tmp_path: Path, own: str, files: dict[str, str], seconds: float) -> None:
    assert limits.throttled_s(*groups(tmp_path, own, files)) == seconds
