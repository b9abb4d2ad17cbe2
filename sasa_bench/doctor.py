"""What this machine can run, and what would unlock the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sasa_bench import machine as machines
from sasa_bench.record import ImplInfo
from sasa_bench.runner import Workers
from sasa_bench.table import size


def implementations(specs: Sequence[str] = ()) -> list[tuple[ImplInfo, str | None]]:
    """(implementation, what it lacks on this machine or None) for every registered one, or for `specs`.

    Raises WorkerRefused for one that does not exist.
    """
    with Workers(timeout_s=120) as workers:
        found = workers.get().ask("describe", impls=list(specs) or None)
    return [(ImplInfo(**{k: v for k, v in i.items() if k != "missing"}), i["missing"]) for i in found]


def lines() -> Iterator[str]:
    """The report of `sasa-bench doctor`."""
    machine = machines.detect()
    yield f"processor        {machine.cpu}, {machine.cores} cores"
    yield f"instructions     {', '.join(machine.isa) or 'none of those that the kernels use'}"
    yield f"memory           {size(machine.memory_bytes)}"
    yield f"GPU              {machine.gpu or 'none found (nvidia-smi shows no device)'}"
    yield f"python           {machine.python}"
    for name in machines.LIBRARIES:
        version = machine.libraries.get(name)
        yield f"{name:16} {version or f'not installed: pip install {name}'}"
    yield ""
    for info, missing in implementations():
        yield f"{info.name:16} {'ready' if missing is None else missing}"
