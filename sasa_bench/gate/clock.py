"""Runs inside the worker of an arm: the gate's own code times the calls of every arm, whatever revision the arm is of.

The gate starts a worker with the text of this file, so it may use nothing of the package but what is looked up here, in
the places where revisions keep the requests of a paired measurement.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

_now = time.perf_counter  # taken before any code of the arm could put another in its place
_devices: dict[str, str] = {}

BESIDE = "SASA_BENCH_BESIDE"
"""The variable with the folders of kernel files, for what they import while they run. Python looks there last, so that
a profile.py beside a kernel hides no module of Python."""


def seconds(step: Any, count: int, device: str) -> float:
    """Seconds that `count` calls take: between two events on CUDA, by the monotonic clock elsewhere."""
    if device != "cuda":
        start = _now()
        for _ in range(count):
            step()
        return _now() - start
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def take_over(blocks: ModuleType) -> None:
    """Replace the requests of `blocks`, the module of an arm, that time something."""
    requests = blocks.REQUESTS
    prepare_cases = requests["prepare_cases"]

    def remember(cases: dict[str, list[Any]], **options: Any) -> Any:
        _devices.update({key: fields.get("device", "cpu") for key, (_, fields) in cases.items()})
        return prepare_cases(cases=cases, **options)

    def calibrate(keys: list[str], block_s: float) -> dict[str, list[float]]:
        found = {}
        for key in keys:
            step = blocks._use(key).step
            times: list[float] = []
            while len(times) < 3 or sum(times) < 2 * block_s:
                times.append(seconds(step, 1, _devices[key]))
                if times[-1] <= 0:
                    raise RuntimeError(f"the clock did not move while {key} ran: its times cannot be trusted")
            found[key] = [max(1, round(block_s / min(times))), min(times)]
        return found

    def block(key: str, count: int, spin_s: float) -> float:
        step = blocks._use(key).step

        def slowed() -> None:
            step()
            end = _now() + spin_s
            while _now() < end:
                pass

        return seconds(slowed if spin_s else step, count, _devices[key]) / count

    requests.update({"prepare_cases": remember, "calibrate": calibrate, "block": block})


def main() -> None:
    """Take over the clock of the arm on the path, then serve as its worker."""
    sys.path += [folder for folder in os.environ.get(BESIDE, "").split(os.pathsep) if folder]
    package = importlib.import_module("sasa_bench")
    # Files are looked for, not modules: an installed sasa-bench may offer modules that this revision has not.
    if any(Path(folder, "timing", "blocks.py").exists() for folder in package.__path__):
        take_over(importlib.import_module("sasa_bench.timing.blocks"))
    else:
        raise SystemExit(
            "the gate does not find the paired measurement (timing/blocks.py) of this revision of sasa-bench: "
            "give a newer revision"
        )
    runpy.run_module("sasa_bench.worker", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
