"""What about this machine spoils measurements, as it is now and over a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sasa_bench.results.environment import UnfitEnvironmentError, require_free_threads, spoiling
from sasa_bench.results.record import Conditions
from sasa_bench.timing import host, limits, probe

BUSY = 0.2
"""Share of the cores that others may keep busy."""

PROBES = 20
"""Tries of the fixed work at either end of a run."""


def spoilers(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each thing that makes times noisy, slow or unlike those of other runs, with the remedy."""
    return [
        *_container(root),
        *_environment(environment, root),
        *_processor(root / "sys/devices/system/cpu"),
        *_load(root),
    ]


def busy_now(seconds: float = 0.5) -> list[str]:
    """A sentence where others compute at this moment: the load, a mean over a minute, shows them later."""
    begin = host.read()
    time.sleep(seconds)
    found = host.between(begin, host.read())
    if found.total <= BUSY:
        return []
    return [
        f"now other processes take {found.others:.0%} of all cores and the hypervisor {found.stolen:.0%}: wait until "
        "they are done, or stop them"
    ]


@dataclass(frozen=True)
class Moment:
    """What `during` needs of the moment when a run began."""

    conditions: Conditions
    reading: host.Reading
    pressure_s: float | None
    throttled_s: float | None


def before(machine: str, root: Path = Path("/")) -> Moment:
    """The machine, named by its id, when a run begins."""
    reading, pressure, throttled = host.read(), _pressure(root), limits.throttled_s(*_groups(root))
    conditions = Conditions(
        machine=machine,
        moment="before",
        **_settings(root),
        pressure=pressure[0],
        stolen=reading.stolen / whole if (whole := reading.busy + reading.stolen + reading.idle) else None,
        throttled_s=throttled,
    )
    return Moment(conditions, reading, pressure[1], throttled)


def after(began: Moment, root: Path = Path("/")) -> Conditions:
    """The machine when a run ends, and what happened meanwhile."""
    reading, pressure, throttled = host.read(), _pressure(root), limits.throttled_s(*_groups(root))
    elapsed = reading.at - began.reading.at
    waited = None
    if pressure[1] is not None and began.pressure_s is not None and elapsed > 0:
        waited = min(1.0, (pressure[1] - began.pressure_s) / elapsed)
    return Conditions(
        machine=began.conditions.machine,
        moment="after",
        **_settings(root),
        pressure=waited,
        stolen=host.between(began.reading, reading).stolen if reading.busy else None,
        throttled_s=None if throttled is None else throttled - (began.throttled_s or 0.0),
    )


def _settings(root: Path) -> dict[str, Any]:
    folder = root / "sys/devices/system/cpu"
    words = _read(root / "proc/loadavg").split()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "governor": ", ".join(_governors(folder)) or None,
        "turbo": _turbo(folder),
        "smt": {"1": "on", "0": "off"}.get(_read(folder / "smt/active")),
        "quota": limits.cpu_quota(*_groups(root)),
        "load": float(words[0]) if words else None,
        "probe_s": min(host.probe() for _ in range(PROBES)),
    }


def _groups(root: Path) -> tuple[Path, Path]:
    return root / "sys/fs/cgroup", root / "proc/self/cgroup"


def _pressure(root: Path) -> tuple[float | None, float | None]:
    """(share of the last minute, seconds since start-up) in which a process waited for a processor; see PSI."""
    words = dict(word.split("=") for word in _read(root / "proc/pressure/cpu").partition("\n")[0].split()[1:])
    if "avg60" not in words or "total" not in words:
        return None, None
    return float(words["avg60"]) / 100, int(words["total"]) / 1e6


def _governors(folder: Path) -> list[str]:
    return sorted({_read(path) for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""})


def _turbo(folder: Path) -> str | None:
    """ "on" or "off"; None where the system does not show it."""
    found = _read(folder / "intel_pstate/no_turbo"), _read(folder / "cpufreq/boost")
    if found[0] == "0" or found[1] == "1":
        return "on"
    return "off" if any(found) else None


def _container(root: Path) -> Iterator[str]:
    quota = limits.cpu_quota(*_groups(root))
    if quota is not None:
        yield (
            f"a quota of {quota:g} processors: a process that uses more is stopped until the next period, in the "
            "middle of a measurement; give the container whole cores instead (docker run --cpuset-cpus=0-3)"
        )


def _environment(environment: Mapping[str, str], root: Path) -> Iterator[str]:
    if preloaded := _read(root / "etc/ld.so.preload"):
        yield f"/etc/ld.so.preload loads {', '.join(preloaded.split())} into every process: empty it"
    yield from spoiling(environment)
    try:
        require_free_threads(environment)
    except UnfitEnvironmentError as error:
        yield str(error)


def _processor(folder: Path) -> Iterator[str]:
    if governors := [name for name in _governors(folder) if name != "performance"]:
        yield (
            f"governor {', '.join(governors)}: the clock follows the load, so short measurements run slower; "
            "cpupower frequency-set --governor performance"
        )
    if _turbo(folder) == "on":
        yield (
            "turbo is on: the clock depends on temperature and on what other cores do; echo 1 > "
            "/sys/devices/system/cpu/intel_pstate/no_turbo, or echo 0 > /sys/devices/system/cpu/cpufreq/boost"
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
        many = "1 core" if cores == 1 else f"{cores} cores"
        yield f"load {words[0]} on {many}: other processes compute; wait until they are done, or stop them"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
