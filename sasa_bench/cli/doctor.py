"""What this machine can run, and what would unlock the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sasa_bench.results import environment
from sasa_bench.results.format import size
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import ImplInfo
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing import nvml, probe
from sasa_bench.timing.conditions import busy_now, spoilers


def implementations(specs: Sequence[str] = ()) -> list[tuple[ImplInfo, str | None]]:
    """(implementation, what it lacks on this machine or None) for every registered one, or for `specs`.

    Raises WorkerRefused for one that does not exist.
    """
    return [(ImplInfo.from_dict(info), info["missing"]) for info in _described(specs)]


def _described(specs: Sequence[str] = (), details: bool = False) -> list[dict[str, Any]]:
    with Workers(timeout_s=120) as workers:
        found: list[dict[str, Any]] = workers.get().ask("describe", impls=list(specs) or None, details=details)
    return found


def lines() -> Iterator[str]:
    """The report of `sasa-bench doctor`."""
    machine = probe.detect()
    yield f"sasa-bench       {metadata.version('sasa-bench')}, revision {machine.revision}"
    yield f"processor        {machine.cpu}, {machine.cores} cores" + (
        f" (a quota of {machine.cpu_quota:g})" if machine.cpu_quota else ""
    )
    yield f"instructions     {', '.join(machine.isa) or 'none of those that the kernels use'}"
    yield f"memory           {size(machine.memory_bytes)}"
    yield f"GPU              {machine.gpu or 'none found (nvidia-smi shows no device)'}"
    yield f"NVML             {_gpu_state()}"
    yield f"compiler         {_compiler()}"
    yield f"python           {machine.python}"
    for name in probe.LIBRARIES:
        version = machine.libraries.get(name)
        yield f"{name:16} {version or 'not installed; the lines below have the command'}"
    yield from ("", *_variables(machine), "")
    for info in _described(details=True):
        yield f"{info['name']:18} {'ready' if info['missing'] is None else info['missing']}"
        for line in info["details"]:
            yield f"{'':18} {line}"
    yield from ("", *chosen())


def _compiler() -> str:
    try:
        from sasa_bench.impls._native import describe_compiler
    except ImportError as error:
        return f"not looked for: {environment.absent(error) or error}"
    return describe_compiler()


def _variables(machine: Machine) -> Iterator[str]:
    """The environment variables that matter, with their values and what each changes."""
    yield "environment variables"
    for name, purpose in environment.READ.items():
        yield f"  {name:24} {os.environ.get(name, 'unset'):12} {purpose}"
    for name, value in machine.environment.items():
        given = "set by sasa-bench: " if name in environment.worker_environment() else ""
        known = environment.SET.get(name) or next(
            text for begin, text in environment.RECORDED.items() if name.startswith(begin)
        )
        if name not in environment.READ:
            yield f"  {name:24} {value:12} {given}{known}"


def chosen() -> Iterator[str]:
    """What impl = "auto" runs on this machine, and why."""
    from sasa_bench.nn.choice import explain

    yield from (f"auto  {line}" for line in explain())


def learn(files: Sequence[Path]) -> str:
    """Store the order of implementations that these results of this machine show; a sentence that says where."""
    from sasa_bench.nn.choice import learn as store
    from sasa_bench.results.file import read, require_described

    found, here = read(files), probe.detect().hardware_id
    require_described(found)
    rows = [row for row in found.rows if found.machines[row.machine].hardware_id == here]
    return f"impl = 'auto' follows {store(rows)} from now on; delete it to return to the committed order"


def spoiling() -> list[str]:
    """What spoils measurements on this machine, a line each."""
    return [f"spoils measurements: {sentence}" for sentence in (*spoilers(), *busy_now())]


def _gpu_state() -> str:
    try:
        found = nvml.find()
    except nvml.NvmlAbsentError as error:
        return str(error)
    figures = found.limits() | found.state()
    told = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    held = found.throttling()
    slowed = (
        "throttling: not reported" if held is None else f"throttled by {', '.join(held)}" if held else "not throttled"
    )
    return f"{told or 'no figures'}; {slowed}"
