"""Where the time of a call goes: torch.profiler on one case and implementation, as Chrome traces and a summary."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sasa_bench import impls as registry
from sasa_bench.case import Case, UserError
from sasa_bench.ops.tensors import leaves, random_tensors, step
from sasa_bench.results.format import flops_key
from sasa_bench.timing import switches
from sasa_bench.timing.check import gradient_of_output
from sasa_bench.timing.prepared import no_device
from sasa_bench.timing.stages import Stages

CALLS = 5
"""Calls in a trace, after as many that warm up."""

PHASE_CALLS = 30
"""Calls with timers inside the kernel, and as many without, interleaved."""

Run = Callable[[], object]


class ProfileError(UserError):
    """An implementation that cannot be profiled on a case; the message states why."""


def capture(impl: str, case: Case, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Profile `impl` on `case`; write its traces under `folder` and return the summary.

    traces/NAME/NAME.pt.trace.json   operators with shapes and memory, Python stacks; TensorBoard and Perfetto read it
    stages/NAME.json                 the same calls, each operator in the range of its stage; slower, for the shares

    The summary holds name, op, summary, calls, `time_s` (median of a call that is not profiled), the paths relative to
    `folder`, `flops` a call by trace.flops_key, as torch counts them, and `phases` inside the kernel, where the
    implementation counts them. The call of an implementation that works outside torch may have a method
    `chrome_trace(path, calls)` that writes its own trace; it replaces both.

    Raises ProfileError where the implementation cannot do the case, UnknownImplError for an unknown one.
    """
    found = registry.get(impl)
    reason = switches.unfit(case) or found.supports(case) or no_device(case) or found.missing()
    if reason:
        raise ProfileError(f"{found.name} cannot run {case.describe()}: {reason}")
    switches.apply(case if case.threads else case.with_(threads=torch.get_num_threads()))
    computed = found.computes(case)
    tensors = leaves(random_tensors(found.op, computed, seed), computed)
    call = found.build(computed, tensors)
    with torch.no_grad():
        y = call()
    grad_y = None if case.mode == "forward" else gradient_of_output(computed, y, seed)
    run = step(computed, call, tensors, grad_y)
    summary: dict[str, Any] = {
        **asdict(registry.info(found)),
        "calls": CALLS,
        "time_s": _time(run, case.device),
        "flops": {},
        "stages": None,
        "phases": None,
    }
    trace = folder / "traces" / found.name / f"{found.name}.pt.trace.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    summary["trace"] = str(trace.relative_to(folder))
    own = getattr(call, "chrome_trace", None)
    if own is not None:
        own(trace, CALLS)
        return summary
    with _named_ranges(found.name, case.device):
        profiler = _profile(run, case.device, detailed=True)
    profiler.export_chrome_trace(str(trace))
    summary["flops"] = {
        flops_key(e.key, e.input_shapes): e.flops / CALLS
        for e in profiler.key_averages(group_by_input_shape=True)
        if e.flops
    }
    stages = folder / "stages" / f"{found.name}.json"
    stages.parent.mkdir(parents=True, exist_ok=True)

    def staged() -> None:
        with Stages(tensors, only_backward=case.mode == "backward"):
            step(computed, call, tensors, grad_y)()

    _profile(staged, case.device, detailed=False).export_chrome_trace(str(stages))
    summary["stages"] = str(stages.relative_to(folder))
    if found.info.phases is not None:
        summary["phases"] = asdict(found.info.phases(run, torch.get_num_threads(), PHASE_CALLS))
    return summary


def _profile(run: Run, device: str, detailed: bool) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=CALLS, active=CALLS, repeat=1),
        record_shapes=detailed,
        profile_memory=detailed,
        with_stack=detailed,
        with_flops=detailed,
        acc_events=True,
    ) as profiler:
        for _ in range(2 * CALLS):
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            profiler.step()
    return profiler


def _time(run: Run, device: str) -> float:
    """Median seconds of a call without the profiler."""
    times = []
    for _ in range(3 + CALLS):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _named_ranges(name: str, device: str) -> AbstractContextManager[object]:
    """On CUDA, an NVTX range for Nsight Systems, if it records this process."""
    return torch.cuda.nvtx.range(name) if device == "cuda" else nullcontext()
