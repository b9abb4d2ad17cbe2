"""Chrome traces, as torch.profiler and ONNX Runtime write them: operators, kernels, stages, stacks, memory."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_bench.case import UserError
from sasa_bench.results.format import joined_shapes

STEP, STAGE, MEMORY = "ProfilerStep", "stage: ", "[memory]"
OPERATORS, KERNELS = ("cpu_op", "Node"), ("kernel", "gpu_memcpy", "gpu_memset")
PROFILER = "torch/profiler/profiler.py"
US = 1e-6
ROUNDING_US = 0.5
"""How far a range may reach beyond the one it lies in."""


class TraceError(UserError):
    """A file that is no Chrome trace; the message says which and why."""


@dataclass
class Span:
    """A range of a trace: microseconds from an arbitrary start, what the writer says of it, and what ran inside."""

    name: str
    kind: str
    start_us: float
    length_us: float
    args: Mapping[str, Any]
    inside: list[Span] = field(default_factory=list)

    @property
    def end_us(self) -> float:
        """Where it ends."""
        return self.start_us + self.length_us


@dataclass(frozen=True)
class Operator:
    """One operator with one set of input shapes, per call: times in seconds, FLOPs where torch counts them."""

    name: str
    shapes: str
    count: float
    self_s: float
    total_s: float
    allocated_bytes: float
    flops: float | None


@dataclass(frozen=True)
class Box:
    """One frame of a flame graph: depth from 0, start and length in seconds per call."""

    name: str
    kind: str
    depth: int
    start_s: float
    length_s: float


@dataclass(frozen=True)
class Trace:
    """A trace as read.

    spans    the outermost ranges of each thread
    steps    the ranges of the profiler's steps, one a call; none where the writer marks no calls
    calls    how many calls it holds: every figure of the functions below is for one call
    """

    spans: list[Span]
    steps: list[Span]
    kernels: list[Span]
    memory: list[tuple[float, int, int]]
    calls: int


def read(path: Path, calls: int) -> Trace:
    """Read a trace, plain or gzipped. Raises TraceError."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        data = json.loads(raw)
        events = data["traceEvents"] if isinstance(data, dict) else data
        lanes: dict[Any, list[Span]] = {}
        steps, kernels, memory = [], [], []
        for event in events:
            if event.get("name") == MEMORY:
                args = event["args"]
                memory.append((float(event["ts"]), int(args["Bytes"]), int(args["Total Allocated"])))
            elif event.get("ph") == "X":
                span = Span(
                    event["name"],
                    event.get("cat", ""),
                    float(event["ts"]),
                    float(event.get("dur", 0)),
                    event.get("args", {}),
                )
                if span.kind in KERNELS:
                    kernels.append(span)
                elif span.name.startswith(STEP):
                    steps += [] if span.kind.startswith("gpu") else [span]
                elif not span.name.startswith("PyTorch Profiler") and span.kind != "Trace":
                    lanes.setdefault((event.get("pid"), event.get("tid"), span.kind.startswith("gpu")), []).append(span)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{path} is no Chrome trace ({type(error).__name__}: {error})") from None
    return Trace([root for lane in lanes.values() for root in _nest(lane)], steps, kernels, sorted(memory), calls)


def _nest(lane: list[Span]) -> list[Span]:
    roots: list[Span] = []
    open_spans: list[Span] = []
    for span in sorted(lane, key=lambda s: (s.start_us, -s.length_us)):
        while open_spans and open_spans[-1].end_us < span.end_us - ROUNDING_US:
            open_spans.pop()
        (open_spans[-1].inside if open_spans else roots).append(span)
        open_spans.append(span)
    return roots


def walk(spans: Sequence[Span]) -> Iterator[Span]:
    """Every span, outer before inner."""
    for span in spans:
        yield span
        yield from walk(span.inside)


def _measured(trace: Trace, spans: Sequence[Span]) -> Iterator[Span]:
    """The outermost spans that lie within a step, less the profiler's own; everything where no steps are marked."""
    for span in spans:
        if PROFILER in span.name:
            continue
        if not trace.steps or any(
            step.start_us <= span.start_us and span.end_us <= step.end_us + ROUNDING_US for step in trace.steps
        ):
            yield span
        else:
            yield from _measured(trace, span.inside)


def _tops(spans: Sequence[Span]) -> Iterator[Span]:
    """The outermost operators."""
    for span in spans:
        if span.kind in OPERATORS:
            yield span
        else:
            yield from _tops(span.inside)


def operators(trace: Trace, flops: Mapping[str, float] | None = None) -> list[Operator]:
    """Operators by name and input shapes, the costliest by self time first. `flops`: per call, by flops_key."""
    found: dict[tuple[str, str], list[float]] = {}
    moments = trace.memory
    at = 0
    allocated: dict[int, float] = {}
    spans = [span for span in walk(trace.spans) if span.kind in OPERATORS and _is_work(span)]
    for span in sorted(spans, key=lambda s: s.start_us):
        inner = sum(child.length_us for child in _tops(span.inside))
        sums = found.setdefault((_label(span), _shapes(span)), [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += (span.length_us - inner) * US
        sums[2] += span.length_us * US
    ordered = sorted(spans, key=lambda s: s.start_us)
    open_spans: list[Span] = []
    for span in ordered:
        while at < len(moments) and moments[at][0] < span.start_us:
            _charge(open_spans, moments[at], allocated)
            at += 1
        while open_spans and open_spans[-1].end_us <= span.start_us:
            open_spans.pop()
        open_spans.append(span)
    for moment in moments[at:]:
        _charge(open_spans, moment, allocated)
    bytes_of: dict[tuple[str, str], float] = {}
    for span in spans:
        key = _label(span), _shapes(span)
        bytes_of[key] = bytes_of.get(key, 0.0) + allocated.get(id(span), 0.0)
    return sorted(
        (
            Operator(
                name,
                shapes,
                count / trace.calls,
                self_s / trace.calls,
                total_s / trace.calls,
                bytes_of[name, shapes] / trace.calls,
                (flops or {}).get(f"{name} {shapes}"),
            )
            for (name, shapes), (count, self_s, total_s) in found.items()
        ),
        key=lambda operator: -operator.self_s,
    )


def _charge(open_spans: list[Span], moment: tuple[float, int, int], allocated: dict[int, float]) -> None:
    """Bytes allocated at a moment belong to the innermost operator that runs then."""
    when, size, _ = moment
    for span in reversed(open_spans):
        if span.start_us <= when < span.end_us:
            if size > 0:
                allocated[id(span)] = allocated.get(id(span), 0.0) + size
            return


def _is_work(span: Span) -> bool:
    return span.kind != "Node" or span.name.endswith("_kernel_time")


def _label(span: Span) -> str:
    return str(span.args.get("op_name") or span.name)


def _shapes(span: Span) -> str:
    if "Input Dims" in span.args:
        return joined_shapes(span.args["Input Dims"])
    typed = span.args.get("input_type_shape", [])
    return " ".join("×".join(map(str, dims)) for item in typed for dims in item.values())


def kernels(trace: Trace) -> list[Operator]:
    """What ran on the GPU, the costliest first."""
    found: dict[str, list[float]] = {}
    for span in trace.kernels:
        sums = found.setdefault(span.name, [0, 0.0])
        sums[0] += 1
        sums[1] += span.length_us * US
    return sorted(
        (Operator(n, "", c / trace.calls, s / trace.calls, s / trace.calls, 0.0, None) for n, (c, s) in found.items()),
        key=lambda operator: -operator.self_s,
    )


def stages(trace: Trace) -> dict[str, float]:
    """Seconds per call of each stage whose ranges the trace holds: on the GPU where it ran there, else of operators."""
    on_gpu: dict[str, float] = {}
    on_cpu: dict[str, float] = {}
    for span in walk(trace.spans):
        if span.name.startswith(STAGE):
            name = span.name.removeprefix(STAGE)
            if span.kind.startswith("gpu"):
                on_gpu[name] = on_gpu.get(name, 0.0) + span.length_us * US / trace.calls
            else:
                spent = sum(top.length_us for top in _tops(span.inside))
                on_cpu[name] = on_cpu.get(name, 0.0) + spent * US / trace.calls
    return on_gpu or on_cpu


def memory(trace: Trace, most: int = 1500) -> list[tuple[float, int]]:
    """(seconds, bytes in use above the least) over the first call, thinned to `most` points that keep the peaks."""
    first = min(trace.steps, key=lambda step: step.start_us, default=None)
    inside = [m for m in trace.memory if first is None or first.start_us <= m[0] <= first.end_us]
    if not inside:
        return []
    start, least = inside[0][0], min(total for _, _, total in inside)
    every = max(1, len(inside) // most)
    thinned = [max(inside[i : i + every], key=lambda m: m[2]) for i in range(0, len(inside), every)]
    return [((when - start) * US, total - least) for when, _, total in thinned]


def flame(trace: Trace, least: float = 0.002) -> list[Box]:
    """Stacks of Python frames and operators added up over calls, without frames below `least` of the whole."""
    root: dict[str, Any] = {"length": 0.0, "inside": {}}
    for span in _measured(trace, trace.spans):
        root["length"] += span.length_us
        _add(root, span)
    boxes: list[Box] = []
    scale = US / trace.calls
    _lay(root, 0.0, 0, least * root["length"], scale, boxes)
    return boxes


def _add(node: dict[str, Any], span: Span) -> None:
    if span.kind == "Node" and not _is_work(span):
        return
    name = _frame(span)
    found = node["inside"].setdefault(name, {"length": 0.0, "kind": span.kind, "inside": {}})
    found["length"] += span.length_us
    for child in span.inside:
        _add(found, child)


def _lay(node: dict[str, Any], at: float, depth: int, least: float, scale: float, boxes: list[Box]) -> None:
    for name, child in sorted(node["inside"].items(), key=lambda item: -item[1]["length"]):
        if child["length"] < least:
            continue
        kind = "Python" if child["kind"] == "python_function" else "operator"
        boxes.append(Box(name, kind, depth, at * scale, child["length"] * scale))
        _lay(child, at, depth + 1, least, scale, boxes)
        at += child["length"]


def _frame(span: Span) -> str:
    """`/a/b/c/file.py(12): name` -> `c/file.py:12 name`."""
    match = re.fullmatch(r"(.*?)([^/\\]+[/\\][^/\\]+\.py)\((\d+)\): (.*)", span.name)
    if match:
        return f"{match[2]}:{match[3]} {match[4]}"
    return _label(span)
