"""What about this machine spoils measurements, as it is now."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sasa_bench.results.environment import BINDING, UnfitEnvironmentError, require_unbound
from sasa_bench.timing import limits, probe

BUSY = 0.2
"""Share of the cores that others may keep busy."""


def spoilers(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each thing that makes times noisy, slow or unlike those of other runs, with the remedy."""
    return [*_container(root), *_environment(environment), *_processor(root / "sys/devices/system/cpu"), *_load(root)]


def _container(root: Path) -> Iterator[str]:
    quota = limits.cpu_quota(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    if quota is not None:
        yield (
            f"a quota of {quota:g} processors: a process that uses more is stopped until the next period, in the "
            "middle of a measurement; give the container whole cores instead (docker run --cpuset-cpus=0-3)"
        )


def _environment(environment: Mapping[str, str]) -> Iterator[str]:
    if preloaded := environment.get("LD_PRELOAD"):
        yield f"LD_PRELOAD={preloaded}: another allocator or library is timed along; unset it"
    try:
        require_unbound({name: environment[name] for name in BINDING if name in environment})
    except UnfitEnvironmentError as error:
        yield str(error)


def _processor(folder: Path) -> Iterator[str]:
    governors = {_read(path) for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {"", "performance"}
    if governors:
        yield (
            f"governor {', '.join(sorted(governors))}: the clock follows the load, so short measurements run slower; "
            "cpupower frequency-set --governor performance"
        )
    if _read(folder / "intel_pstate/no_turbo") == "0" or _read(folder / "cpufreq/boost") == "1":
        yield (
            "turbo is on: the clock depends on temperature and on what other cores do; echo 1 > "
            "/sys/devices/system/cpu/intel_pstate/no_turbo, or 0 > /sys/devices/system/cpu/cpufreq/boost"
        )
    if _read(folder / "smt/active") == "1":
        yield (
            "SMT is on: two threads may share one core; use one thread of each core (taskset, or -c threads=), or "
            "echo off > /sys/devices/system/cpu/smt/control"
        )


def _load(root: Path) -> Iterator[str]:
    words = _read(root / "proc/loadavg").split()
    cores = probe.available_cores()
    if words and float(words[0]) > BUSY * cores:
        yield f"load {words[0]} on {cores} cores: other processes compute; wait until they are done, or stop them"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
