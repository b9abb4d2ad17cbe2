"""What a trace contains: operators, kernels, stages, stacks, memory, threads and idle time. Times in seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sasa_bench.profiling.costs import Cost
from sasa_bench.profiling.trace import (
    FRAME,
    OPERATOR,
    OTHER,
    ROUNDING_US,
    STAGE,
    Label,
    Lane,
    Trace,
    nearest,
)

PROFILER = re.compile(r"torch[/\\](profiler[/\\]|autograd[/\\]profiler)")
US = 1e-6


@dataclass(frozen=True)
class Operator:
    """One operator (or annotation, or kernel) with one set of input shapes, per call.

    self_s  without the operators inside; gpu_s: of the kernels that it launched itself, gpu_total_s: or an operator
            inside it
    flops   by torch or by costs.cost; bytes: the least that it can move; None where not known
    """

    name: str
    shapes: str
    count: float
    self_s: float
    total_s: float
    gpu_s: float = 0.0
    allocated_bytes: float = 0.0
    flops: float | None = None
    bytes: float | None = None
    gpu_total_s: float = 0.0


@dataclass(frozen=True)
class Box:
    """One frame of a flame graph: depth from 0, start and length in seconds per call."""

    name: str
    kind: str
    depth: int
    start_s: float
    length_s: float


@dataclass(frozen=True)
class Thread:
    """One thread or stream over the whole trace; count is that of its outermost operators, or of its kernels."""

    name: str
    gpu: bool
    count: int
    busy_s: float
    idle_s: float


@dataclass(frozen=True)
class Gap:
    """A pause of a thread: seconds after the first work of the trace, its length, and the work before and after it."""

    thread: str
    start_s: float
    length_s: float
    before: str
    after: str


def operators(trace: Trace, flops: Mapping[str, float] | None = None, kind: str = OPERATOR) -> list[Operator]:
    """Operators by name and input shapes, the costliest by self time first; with `kind` ANNOTATION, annotations.

    flops: of all runs in a call, by flops_key; where it is given it replaces the formulas of `costs`.
    """
    count, self_us, total_us, gpu_us, gpu_all_us, allocated = (np.zeros(len(trace.labels)) for _ in range(6))
    annotation = trace.is_kind(kind)
    launched, operator = _launched(trace), trace.is_kind(OPERATOR)
    for number, lane in enumerate(trace.lanes):
        if lane.gpu:
            continue
        rows = lane.is_operator if kind == OPERATOR else annotation[lane.label]
        inside = _inside(trace, lane, kind)
        label = lane.label[rows]
        count += np.bincount(label, minlength=len(count))
        total_us += np.bincount(label, lane.length[rows], len(count))
        self_us += np.bincount(label, (lane.length - inside)[rows], len(count))
        allocated += np.bincount(label, _allocated(trace, number, lane)[rows], len(count))
        if launched is not None:
            alone = _kernel_time(lane, operator[lane.label], launched)
            gpu_us += np.bincount(label, alone[rows], len(count))
            gpu_all_us += np.bincount(label, _with_inner(lane, alone)[rows], len(count))
    merged: dict[tuple[str, str], list[int]] = {}
    for i in np.flatnonzero(count):
        merged.setdefault((trace.labels[i].name, trace.labels[i].shapes), []).append(int(i))
    calls = trace.calls
    found = []
    for (name, shapes), labels in merged.items():
        each = count[labels].sum() / calls
        cost = _cost(trace, labels, count)
        known = (flops or {}).get(f"{name} {shapes}")
        found.append(
            Operator(
                name,
                shapes,
                float(each),
                float(self_us[labels].sum() * US / calls),
                float(total_us[labels].sum() * US / calls),
                float(gpu_us[labels].sum() * US / calls),
                float(allocated[labels].sum() / calls),
                known or (cost[0] / calls if cost and flops is None else None),
                cost[1] / calls if cost else None,
                float(gpu_all_us[labels].sum() * US / calls),
            )
        )
    return sorted(found, key=lambda operator: -operator.self_s)


def _cost(trace: Trace, labels: Sequence[int], count: np.ndarray) -> Cost | None:
    """Of all runs with these labels, as of convolutions of one input at several strides; None where one is unknown."""
    each = [trace.labels[i].cost for i in labels]
    known = [(n * cost[0], n * cost[1]) for cost, n in zip(each, count[labels].tolist(), strict=True) if cost]
    return (sum(f for f, _ in known), sum(b for _, b in known)) if len(known) == len(each) else None


def _inside(trace: Trace, lane: Lane, kind: str) -> np.ndarray:
    """[ranges] length of what directly inside each range is an operator or of `kind`."""
    work = lane.is_operator | (trace.is_kind(kind)[lane.label] & (kind != OPERATOR))
    around = lane.operator if kind == OPERATOR else nearest(lane, work)
    rows = work & (around >= 0)
    return np.bincount(around[rows], lane.length[rows], len(lane.length))


def _launched(trace: Trace) -> np.ndarray | None:
    """Microseconds of kernels by the id of the operator that launched them; index -1 is 0; None without kernels."""
    kernel = trace.is_kind("kernel")
    found = [(lane.external[k], lane.length[k]) for lane in trace.lanes if lane.gpu for k in (kernel[lane.label],)]
    ids = np.concatenate([i for i, _ in found]) if found else np.empty(0, int)
    known = (ids >= 0) & (ids < 1 << 26)
    if not known.any():
        return None
    lengths = np.concatenate([length for _, length in found])
    return np.append(np.bincount(ids[known], lengths[known]), 0.0)


def _kernel_time(lane: Lane, of_operators: np.ndarray, launched: np.ndarray) -> np.ndarray:
    """[ranges] microseconds of the kernels that each operator launched, or what counts as part of it."""
    rows = np.flatnonzero(of_operators)
    owner = np.where(lane.is_operator[rows], rows, lane.operator[rows])
    return np.bincount(owner, launched[np.clip(lane.external[rows], -1, len(launched) - 1)], len(lane.length))


def _with_inner(lane: Lane, spent: np.ndarray) -> np.ndarray:
    """[ranges] `spent` of each range and of all ranges inside it."""
    whole = spent.tolist()
    parents = lane.parent.tolist()
    for i in range(len(whole) - 1, -1, -1):
        if parents[i] >= 0:
            whole[parents[i]] += whole[i]
    return np.array(whole)


def _allocated(trace: Trace, number: int, lane: Lane) -> np.ndarray:
    """[ranges] bytes allocated while each range was the innermost operator of its lane."""
    found = np.zeros(len(lane.start))
    moments = trace.memory[(trace.memory[:, 3] == number) & (trace.memory[:, 1] > 0)]
    ends = lane.start + lane.length
    for i, moment in zip(np.searchsorted(lane.start, moments[:, 0], side="right") - 1, moments, strict=True):
        while i >= 0 and not (lane.is_operator[i] and moment[0] < ends[i]):
            i = lane.parent[i]
        if i >= 0:
            found[i] += moment[1]
    return found


def kernels(trace: Trace) -> list[Operator]:
    """What ran on the GPU, the costliest first."""
    kernel = trace.is_kind("kernel")
    count, spent = np.zeros(len(kernel)), np.zeros(len(kernel))
    for lane in trace.lanes:
        rows = kernel[lane.label]
        count += np.bincount(lane.label[rows], minlength=len(count))
        spent += np.bincount(lane.label[rows], lane.length[rows] * US, len(count))
    found = [
        Operator(trace.labels[i].name, "", count[i] / trace.calls, spent[i] / trace.calls, spent[i] / trace.calls)
        for i in np.flatnonzero(count)
    ]
    return sorted(found, key=lambda operator: -operator.self_s)


def stages(trace: Trace) -> dict[str, float]:
    """Seconds per call of each stage whose ranges the trace holds: on the GPU where it ran there, else of operators."""
    on_gpu: dict[str, float] = {}
    on_cpu: dict[str, float] = {}
    stage = np.array([label.name.startswith(STAGE) for label in trace.labels], bool)
    for lane in trace.lanes:
        is_stage, is_operator = stage[lane.label], lane.is_operator
        around = nearest(lane, is_stage | is_operator)
        for i in np.flatnonzero(is_stage if lane.gpu else is_operator):
            at = i if lane.gpu else around[i]
            if at >= 0 and is_stage[at]:
                name = trace.labels[lane.label[at]].name.removeprefix(STAGE)
                sums = on_gpu if lane.gpu else on_cpu
                sums[name] = sums.get(name, 0.0) + float(lane.length[i]) * US / trace.calls
    return on_gpu or on_cpu


def memory(trace: Trace, most: int = 1500) -> list[tuple[float, int]]:
    """(seconds, bytes in use above the least), thinned to `most` points that keep the peaks.

    Over the first step, or over the whole trace where it marks none; of the GPU where it has allocations there, of
    several the one with the highest peak.
    """
    moments = trace.memory
    if len(trace.steps):
        start, end = trace.steps[0]
        moments = moments[(moments[:, 0] >= start) & (moments[:, 0] <= end)]
    if not len(moments):
        return []
    moments = moments[moments[:, 4] == moments[:, 4].max()]
    of_devices = [moments[moments[:, 5] == device] for device in np.unique(moments[:, 5])]
    moments = max(of_devices, key=lambda of_one: float(np.ptp(of_one[:, 2])))
    first, least = moments[0, 0], moments[:, 2].min()
    every = max(1, len(moments) // most)
    peaks = [at + int(moments[at : at + every, 2].argmax()) for at in range(0, len(moments), every)]
    return [((float(moments[i, 0]) - first) * US, int(moments[i, 2] - least)) for i in peaks]


def flame(trace: Trace, least: float = 0.002) -> list[Box]:
    """Stacks of Python frames and operators added up over calls, without frames below `least` of the whole."""
    inside: list[dict[str, int]] = [{}]
    length, kinds, names = [0.0], [""], [""]
    frames = [_frame(label) for label in trace.labels]
    for lane in trace.lanes:
        if lane.gpu:
            continue
        measured = _measured(trace, lane).tolist()
        node = [0] * len(measured)
        for i, (label, parent, spent) in enumerate(
            zip(lane.label.tolist(), lane.parent.tolist(), lane.length.tolist(), strict=True)
        ):
            around = node[parent] if parent >= 0 else 0
            name = frames[label]
            node[i] = around
            if name is None or (around == 0 and not measured[i]):
                continue
            found = inside[around].get(name)
            if found is None:
                found = inside[around][name] = len(inside)
                inside.append({})
                length.append(0.0)
                names.append(name)
                kinds.append("Python" if trace.labels[label].kind == FRAME else "operator")
            length[found] += spent
            length[0] += spent if around == 0 else 0.0
            node[i] = found
    boxes: list[Box] = []
    scale = US / trace.calls
    waiting = [(0, 0.0, -1)]
    while waiting:
        at, start, depth = waiting.pop()
        if depth >= 0:
            boxes.append(Box(names[at], kinds[at], depth, start * scale, length[at] * scale))
        for child in sorted(inside[at].values(), key=lambda i: -length[i]):
            if length[child] >= least * length[0]:
                waiting.append((child, start, depth + 1))
            start += length[child]
    return boxes


def _measured(trace: Trace, lane: Lane) -> np.ndarray:
    """[ranges] whether each lies within a step; all do where no steps are marked."""
    if not len(trace.steps):
        return np.ones(len(lane.start), bool)
    step = np.searchsorted(trace.steps[:, 0], lane.start, side="right") - 1
    return (step >= 0) & (lane.start + lane.length <= trace.steps[step, 1] + ROUNDING_US)


def _frame(label: Label) -> str | None:
    """`/a/b/c/file.py(12): name` -> `c/file.py:12 name`; None for what is left out of stacks."""
    if PROFILER.search(label.name) or (label.kind == OTHER and label.name.endswith(("_fence_before", "_fence_after"))):
        return None
    match = re.fullmatch(r"(.*?)([^/\\]+[/\\][^/\\]+\.py)\((\d+)\): (.*)", label.name)
    return f"{match[2]}:{match[3]} {match[4]}" if match else label.name


def threads(trace: Trace) -> list[Thread]:
    """Every thread and stream that works, the busiest first; idle is the rest of the time from first to last work."""
    worked = [(lane, *_work(trace, lane)) for lane in trace.lanes]
    worked = [item for item in worked if len(item[1])]
    if not worked:
        return []
    whole = (max(ends.max() for _, _, ends, _ in worked) - min(starts.min() for _, starts, _, _ in worked)) * US
    found = []
    for lane, starts, ends, _ in worked:
        busy = float((ends - starts).sum()) * US
        found.append(Thread(lane.name, lane.gpu, len(starts), busy, max(0.0, float(whole) - busy)))
    return sorted(found, key=lambda thread: -thread.busy_s)


def gaps(trace: Trace, most: int = 10) -> list[Gap]:
    """The longest pauses between two pieces of work on the busiest thread and on the busiest stream."""
    found: list[Gap] = []
    worked = [(lane, *_work(trace, lane)) for lane in trace.lanes]
    worked = [item for item in worked if len(item[1])]
    origin = min((starts[0] for _, starts, _, _ in worked), default=0.0)
    for gpu in (False, True):
        lanes = [item for item in worked if item[0].gpu == gpu]
        if not lanes:
            continue
        lane, starts, ends, label = max(lanes, key=lambda item: float((item[2] - item[1]).sum()))
        pause = starts[1:] - ends[:-1]
        for i in np.argsort(-pause)[:most]:
            before, after = (trace.labels[label[j]].name for j in (i, i + 1))
            found.append(Gap(lane.name, float(ends[i] - origin) * US, float(pause[i]) * US, before, after))
    return sorted((gap for gap in found if gap.length_s > 0), key=lambda gap: -gap.length_s)[:most]


def _work(trace: Trace, lane: Lane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and label of the outermost operators, or of the kernels of a stream; no two overlap."""
    work = trace.is_kind("kernel")[lane.label] if lane.gpu else lane.is_operator
    rows = np.flatnonzero(work & (lane.operator < 0))
    starts = lane.start[rows]
    if not len(rows):
        return starts, starts, lane.label[rows]
    ends = np.maximum.accumulate(starts + lane.length[rows])
    return np.maximum(starts, np.append(starts[0], ends[:-1])), ends, lane.label[rows]
