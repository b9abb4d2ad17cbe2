"""What a container allows this process: processor time and memory, from the files of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Bytes from which a limit of memory stands for none."""


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Processors' worth of time that this process may use, such as 0.4; None where nothing limits it.

    From cpu.max (version 2) or cpu.cfs_quota_us and cpu.cfs_period_us (version 1) of its group and those above; see
    control-group v2 and the CFS bandwidth control in the kernel's documentation.
    """
    found = []
    for folder in _groups(root, own, "cpu"):
        quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def throttled_s(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Seconds for which a quota has stopped this process's group or one above it; None where that is not shown.

    throttled_usec (version 2) or throttled_time in ns (version 1) of cpu.stat.
    """
    found = []
    for folder in _groups(root, own, "cpu"):
        words = dict(line.split()[:2] for line in _read(folder / "cpu.stat").splitlines() if len(line.split()) > 1)
        for name, unit in (("throttled_usec", 1e-6), ("throttled_time", 1e-9)):
            if words.get(name, "").isdecimal():
                found.append(int(words[name]) * unit)
    return max(found, default=None)


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that this process and those of its group may use together; None where nothing limits it."""
    texts = [
        _read(folder / name)
        for folder in _groups(root, own, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((int(text) for text in texts if text.isdecimal() and int(text) < UNLIMITED), default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, of either version, up to the roots."""
    for line in _read(own).splitlines():
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        # A container often shows the group by its path outside, where only the root is mounted.
        base = root / controllers if controllers else root
        bases = [base, root / controller] if controllers else [base]
        for start in bases:
            folder = start / place.lstrip("/")
            while folder.is_relative_to(start):
                yield folder
                folder = folder.parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
