"""One arm's side of a paired measurement: cases are prepared once, then timed block by block on request."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

import sasa_bench
from sasa_bench.case import Case, from_dict
from sasa_bench.impls import ENTRY_POINTS
from sasa_bench.impls import get as implementation
from sasa_bench.timing import switches
from sasa_bench.timing.prepared import Prepared, References, key_of, prepare
from sasa_bench.timing.probe import LIBRARIES
from sasa_bench.timing.timers import Step, Timer, timer_for


@dataclass(frozen=True)
class _Ready:
    step: Step
    timer: Timer
    case: Case


_ready: dict[str, _Ready] = {}


def loaded() -> dict[str, Any]:
    """What this process really runs: the package's folder and digest, versions, plug-ins, build and native modules."""
    folder = Path(sasa_bench.__file__).resolve().parent
    native = sorted(
        str(path)
        for name, module in list(sys.modules.items())
        if name.startswith("sasa_bench") and (path := getattr(module, "__file__", None)) and str(path).endswith(".so")
    )
    return {
        "folder": str(folder),
        "digest": digest(folder),
        "python": sys.executable,
        "torch": torch.__version__,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "plugins": {entry.name: _plugin_digest(entry) for entry in metadata.entry_points(group=ENTRY_POINTS)},
        "python_version": platform.python_version(),
        "native": {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] for path in native},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _plugin_digest(entry: metadata.EntryPoint) -> str:
    """A hash over the files of the package or module that an entry point names; "" where it is not found."""
    try:
        found = importlib.util.find_spec(entry.module.partition(".")[0])
    except (ImportError, ValueError):
        return ""
    if found is None or not found.origin:
        return ""
    origin = Path(found.origin)
    return (
        digest(origin.parent) if origin.name == "__init__.py" else hashlib.sha256(origin.read_bytes()).hexdigest()[:16]
    )


def digest(folder: Path) -> str:
    """A hash over names and contents of the package's files."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        whole.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def prepare_cases(cases: dict[str, list[Any]], seed: int, exact: bool) -> dict[str, dict[str, Any]]:
    """Prepare each case, key -> [implementation, fields of the case]; key -> fields of a Record.

    With `exact` each is checked against its reference, and the row carries what never flakes: `operator_count`,
    `allocated_bytes`, the peak of what torch allocates in one call, and `budgets`, the error allowed to each output.
    """
    rows = {}
    references: References = {}
    for key in random.sample(list(cases), len(cases)):
        impl, fields = cases[key]
        case = from_dict(fields)
        switches.apply(case)
        prepared: Prepared = prepare(impl, case, seed, lambda what: None, references, check=exact)
        row = prepared.row
        if prepared.step is not None:
            _ready[key] = _Ready(prepared.step, timer_for(case.device), case)
            if exact:
                known = implementation(impl)
                reference = references[key_of(known.op.name, known.computes(case))]
                row = row | _exact(prepared.step) | {"budgets": reference.budgets}
        rows[key] = row
    return rows


def calibrate(keys: list[str], block_s: float) -> dict[str, list[float]]:
    """Key -> [calls that fill a block of block_s, seconds per call of the fastest call]; warms up on the way."""
    found = {}
    for key in keys:
        ready = _use(key)
        times: list[float] = []
        while len(times) < 3 or sum(times) < 2 * block_s:
            times.append(ready.timer(ready.step, 1))
            if times[-1] <= 0:
                raise RuntimeError(f"the clock did not move while {key} ran: its times cannot be trusted")
        found[key] = [max(1, round(block_s / min(times))), min(times)]
    return found


def block(key: str, count: int, spin_s: float) -> float:
    """Seconds per call of a block of calls. `spin_s` makes each call longer by so much, on purpose."""
    ready = _use(key)
    step = ready.step
    if spin_s:

        def slowed(step: Step = step) -> None:
            step()
            end = time.perf_counter() + spin_s
            while time.perf_counter() < end:
                pass

        return ready.timer(slowed, count) / count
    return ready.timer(step, count) / count


def _use(key: str) -> _Ready:
    ready = _ready[key]
    switches.apply(ready.case)
    return ready


def _exact(step: Step) -> dict[str, int]:
    # Not torch.profiler's, which asks whether there is an Inductor and so imports it: two seconds for every worker.
    with profile(profile_memory=True) as profiler:
        step()
    events = profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    operators = sum("::" in event.name() for event in events)
    return {"operator_count": operators, "allocated_bytes": peak}


REQUESTS: dict[str, Callable[..., Any]] = {
    "loaded": loaded,
    "prepare_cases": prepare_cases,
    "calibrate": calibrate,
    "block": block,
}
"""The requests of a paired measurement, by name. gate.clock finds and replaces them in every revision."""
