"""A Chrome trace of torch.profiler or ONNX Runtime in arrays: 29 bytes an event, words once."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from sasa_bench.profiling.costs import Cost, cost
from sasa_bench.profiling.events import Events, TraceError
from sasa_bench.results.format import joined_shapes

STEP, STAGE, MEMORY = "ProfilerStep", "stage: ", "[memory]"
OPERATOR, ANNOTATION, FRAME, OTHER = "operator", "annotation", "Python", "other"
GPU: Final = ("kernel", "gpu_memcpy", "gpu_memset")
ROUNDING_US = 0.5
"""How far a range may reach beyond the one it lies in."""


@dataclass(frozen=True)
class Label:
    """What ranges of one name, kind and input shapes share. `cost` is that of one call, None where it is not known."""

    name: str
    kind: str
    shapes: str = ""
    cost: Cost | None = None


@dataclass
class Lane:
    """The ranges of one thread, or of one stream of a GPU, by start; an outer one before those inside.

    start, length  microseconds, from an arbitrary time
    label          index into Trace.labels
    parent         index of the range around each; -1 for none
    is_operator    whether each is an operator; the only one inside one of the same name counts as part of that
    operator       index of the innermost operator around each; -1 for none
    external       the writer's id of an operator, by which its kernels know it; -1 for none
    """

    name: str
    gpu: bool
    start: np.ndarray
    length: np.ndarray
    label: np.ndarray
    external: np.ndarray
    parent: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    is_operator: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    operator: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass
class Trace:
    """A trace as read.

    steps    [steps, 2] start and end of each step of the profiler, one a call; none where the writer marks none
    memory   [moments, 6] microsecond, bytes allocated (negative: freed), bytes in use, lane (-1: not known), type of
             the device (0: CPU) and its number
    calls    how many calls it holds: every figure of `breakdown` is for one of them
    cut_off  whether the file stops before its end
    """

    labels: list[Label]
    lanes: list[Lane]
    steps: np.ndarray
    memory: np.ndarray
    calls: int = 1
    cut_off: bool = False

    def is_kind(self, *kinds: str) -> np.ndarray:
        """[labels] whether each label is of one of these kinds."""
        return np.array([label.kind in kinds for label in self.labels], bool)

    def ranges(self, name: str) -> Iterator[tuple[float, float]]:
        """(start, length) in microseconds of every range of that name."""
        for lane in self.lanes:
            for i in np.flatnonzero(np.array([label.name == name for label in self.labels])[lane.label]):
                yield float(lane.start[i]), float(lane.length[i])


class _Columns:
    """The events of one lane while they are read."""

    def __init__(self) -> None:
        self.start, self.length, self.label, self.external = array("d"), array("d"), array("i"), array("q")

    def add(self, start: float, length: float, label: int, external: int) -> None:
        self.start.append(start)
        self.length.append(length)
        self.label.append(label)
        self.external.append(external)


class _Reader:
    def __init__(self) -> None:
        self.labels: dict[tuple[Any, ...], int] = {}
        self.found: list[Label] = []
        self.lanes: dict[tuple[Any, Any, bool], _Columns] = {}
        self.names: dict[tuple[Any, Any], str] = {}
        self.steps: list[tuple[float, float]] = []
        self.memory: list[tuple[float, float, float, Any, float, float]] = []
        self.begun: dict[tuple[Any, Any], list[dict[str, Any]]] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Keep what is needed of one event."""
        phase, where = event.get("ph"), (event.get("pid"), event.get("tid"))
        if phase == "X":
            self._range(event, where, float(event.get("dur", 0)))
        elif phase == "B":
            self.begun.setdefault(where, []).append(event)
        elif phase == "E" and self.begun.get(where):
            begin = self.begun[where].pop()
            self._range(begin, where, float(event["ts"]) - float(begin["ts"]))
        elif event.get("name") == MEMORY:
            args = event["args"]
            device = float(args.get("Device Type", 0)), float(args.get("Device Id", 0))
            self.memory.append(
                (float(event["ts"]), float(args["Bytes"]), float(args["Total Allocated"]), where, *device)
            )
        elif phase == "M" and event.get("name") == "thread_name":
            self.names[where] = str(event["args"]["name"])

    def _range(self, event: dict[str, Any], where: tuple[Any, Any], length: float) -> None:
        name, category, args = str(event["name"]), str(event.get("cat", "")), event.get("args") or {}
        gpu = category.startswith("gpu") or category in GPU
        if name.startswith(STEP):
            if not gpu:
                self.steps.append((float(event["ts"]), float(event["ts"]) + length))
            return
        if category == "Trace" or name.startswith("PyTorch Profiler"):
            return
        fields = _FIELDS + (_OF_CONVOLUTIONS if "conv" in name else ())
        key = (name, category, *(str(args.get(field)) for field in fields if field in args))
        number = self.labels.get(key)
        if number is None:
            number = self.labels[key] = len(self.found)
            self.found.append(_label(name, category, args))
        columns = self.lanes.setdefault((*where, gpu), _Columns())
        columns.add(float(event["ts"]), length, number, int(args.get("External id", -1)))


_FIELDS = ("op_name", "Input Dims", "Input type", "input_type_shape")
_OF_CONVOLUTIONS = ("Concrete Inputs",)
"""Holds stride and padding, by which convolutions of one input differ in cost; other numbers would make labels many."""


def _label(name: str, category: str, args: Mapping[str, Any]) -> Label:
    if category == "Node":  # of ONNX Runtime; what is not its kernel's time is around it
        if not name.endswith("_kernel_time"):
            return Label(name, OTHER)
        typed = [(kind, dims) for item in args.get("input_type_shape", []) for kind, dims in item.items()]
        shapes = [dims for _, dims in typed]
        operator = str(args.get("op_name") or name)
        words = " ".join("×".join(map(str, dims)) for dims in shapes)
        return Label(operator, OPERATOR, words, cost(operator, shapes, [kind for kind, _ in typed]))
    if category == "cpu_op":
        given = zip_longest(args.get("Input Dims", []), args.get("Input type", ()), fillvalue="")
        # A list of tensors has a list of shapes.
        typed = [(kind, dims) for dims, kind in given if not dims or not isinstance(dims[0], list)]
        shapes = [dims for _, dims in typed]
        found = cost(name, shapes, [kind for kind, _ in typed], args.get("Concrete Inputs", ()))
        return Label(name, OPERATOR, joined_shapes(shapes), found)
    kinds = {"user_annotation": ANNOTATION, "gpu_user_annotation": ANNOTATION, "python_function": FRAME}
    return Label(name, "kernel" if category in GPU else kinds.get(category, OTHER))


def read(path: Path, calls: int = 1) -> Trace:
    """Read a trace, plain or gzipped. Raises TraceError."""
    reader, events = _Reader(), Events(path)
    try:
        for event in events:
            reader.take(event)
    except TraceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TraceError(f"{path} is not a Chrome trace ({type(error).__name__}: {error})") from None
    if not reader.found:
        raise TraceError(f"{path} is not a Chrome trace of a program: it holds no range of time")
    place = {key[:2]: i for i, key in enumerate(reader.lanes) if not key[2]}
    trace = Trace(
        reader.found,
        [_lane(_named(key, reader.names), key[2], columns) for key, columns in reader.lanes.items()],
        np.array(sorted(reader.steps)).reshape(-1, 2),
        np.array(sorted((t, b, use, place.get(lane, -1), *on) for t, b, use, lane, *on in reader.memory)).reshape(
            -1, 6
        ),
        calls,
        events.cut_off,
    )
    operators = trace.is_kind(OPERATOR)
    numbers = {name: i for i, name in enumerate({label.name for label in trace.labels})}
    names = np.array([numbers[label.name] for label in trace.labels])
    for lane in trace.lanes:
        _nest(lane, operators[lane.label], names[lane.label])
    return trace


def _named(key: tuple[Any, Any, bool], names: Mapping[tuple[Any, Any], str]) -> str:
    pid, tid, gpu = key
    return names.get((pid, tid), f"stream {tid} of GPU {pid}" if gpu else f"thread {tid}")


def _lane(name: str, gpu: bool, columns: _Columns) -> Lane:
    start, length = np.array(columns.start), np.array(columns.length)
    order = np.lexsort((-length, start))
    label, external = np.array(columns.label), np.array(columns.external)
    return Lane(name, gpu, start[order], length[order], label[order], external[order])


def _nest(lane: Lane, operators: np.ndarray, names: np.ndarray) -> None:
    """Fill in what is around each range of a lane."""
    parents = array("i")
    starts, ends = lane.start.tolist(), (lane.start + lane.length).tolist()
    open_ranges: list[int] = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        while open_ranges and (ends[open_ranges[-1]] <= start or ends[open_ranges[-1]] < end - ROUNDING_US):
            open_ranges.pop()
        parents.append(open_ranges[-1] if open_ranges else -1)
        open_ranges.append(i)
    lane.parent = np.array(parents, np.int32)
    around = nearest(lane, operators)
    inside = np.bincount(around[operators & (around >= 0)], minlength=len(around))
    again = (around >= 0) & (names == names[around]) & (inside[around] == 1)
    lane.is_operator = operators & ~again
    lane.operator = nearest(lane, lane.is_operator)


def nearest(lane: Lane, wanted: np.ndarray) -> np.ndarray:
    """[ranges] index of the innermost range around each that is `wanted` ([ranges] of bool); -1 for none."""
    is_wanted, found = wanted.tolist(), array("i")
    for parent in lane.parent.tolist():
        found.append(parent if parent < 0 or is_wanted[parent] else found[parent])
    return np.array(found, np.int32)
