"""Which implementation `impl="auto"` runs, and why.

The rule: of a list for the device and the mode, the fastest first, the first one that is ready on this machine and
takes the tensors, the window and what is done with the layer: torch.func, forward-mode derivatives and exports need
torch's own operators. The list comes from this machine's measurements, where `sasa-bench doctor --choose-from FILE`
stored them, else from choice.csv, the order in the reference results of this repository.
"""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from sasa_bench import impls
from sasa_bench.case import UserError
from sasa_bench.impls import Core, Impl, Window
from sasa_bench.results.file import replace_text
from sasa_bench.results.record import Record

Function = TypeVar("Function", bound=Callable[..., Any])
AUTO = "auto"
COMMITTED = Path(__file__).with_name("choice.csv")


def constant_in_traces(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, which imports the compiler: 2 s for everyone who imports a layer."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Use:
    """What is asked of a layer: on which tensors, and what is done with it.

    exported     "", or by what and how: "onnx", "fixed" for torch.export of one size, "open" for open sizes
    transformed  whether forward-mode derivatives or transforms of torch.func go through it
    width        channels of a head
    """

    device: str
    dtype: torch.dtype
    grad: bool
    exported: str = ""
    transformed: bool = False
    width: int = 1


@dataclass(frozen=True)
class Choice:
    """The name of an implementation, and a sentence that says why it is this one."""

    name: str
    reason: str


def own_file() -> Path:
    """Where the order that was measured on this machine is kept."""
    if folder := os.environ.get("SASA_BENCH_CACHE"):
        return Path(folder) / "choice.csv"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sasa-bench" / "choice.csv"


def choose(use: Use, window: Window, refused: Mapping[str, str] | None = None) -> Choice:
    """The implementation for a use, by the rule above. Raises RuntimeError where none can run.

    `refused` names those that cannot take the tensors at hand, with the reason.
    """
    device = "cpu" if use.device == "meta" else use.device
    mode = "training" if use.grad else "forward"
    orders, source = _orders()
    passed: list[str] = []
    first = orders.get(("onnx", "forward"), ()) if use.exported == "onnx" else ()
    for name in dict.fromkeys((*first, *orders.get((device, mode), ()), *_all())):
        if reason := (refused or {}).get(name) or unfit(name, use, window):
            passed.append(f"{name}: {reason}")
        else:
            return Choice(name, f"the first of {source} that can run" + (f" ({'; '.join(passed)})" if passed else ""))
    raise RuntimeError(f"no implementation of local attention can run this here: {'; '.join(dict.fromkeys(passed))}")


def unfit(name: str, use: Use, window: Window) -> str | None:
    """None, or why an implementation is not for this use."""
    try:
        impl = impls.get(name)
    except (ImportError, UserError) as error:  # the order may name what another version of this package has
        return str(error)
    core = impl.core
    if core is None:
        return "it is built for one size"
    if use.exported and not core.portable:
        return "it does not run as torch operators"
    if use.exported == "open" and not core.open_sizes:
        return "torch.export would fix open sizes"
    if use.transformed and not core.transforms:
        return "torch.func and forward-mode derivatives do not go through it"
    try:
        return refuses(core, use, window) or impl.missing()
    except Exception as error:  # whatever keeps one implementation from saying leaves the others to choose from
        return str(error)


def refuses(core: Core, use: Use, window: Window, relative: bool = False) -> str | None:
    """None, or why a core cannot take a map of one pixel of this use."""
    like = torch.empty(1, window.heads * use.width, 1, 1, dtype=use.dtype, device="meta")
    return core.refuses(window, _Like(use.device, like), relative)  # type: ignore[arg-type]


class _Like:
    """A tensor of one pixel as `Core.refuses` looks at it, on a device that need not be there."""

    def __init__(self, device: str, t: torch.Tensor) -> None:
        self.device, self.dtype, self.shape = torch.device(device), t.dtype, t.shape
        self.element_size = t.element_size


def learn(rows: Iterable[Record], file: Path | None = None) -> Path:
    """Store the order of implementations in rows of this machine; returns the file.

    In each case the time of each is divided by that of the fastest; the order is that of the geometric means, over the
    cases where half of them or more ran. Who did not run in one of these counts as the slowest there. Raises UserError
    where no row is a time of local attention without a stem.
    """
    times: dict[tuple[str, str], dict[object, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.status == "ok" and row.samples_s and row.impl in _all() and row.case.stem == "none":
            mode = "forward" if row.case.mode == "forward" else "training"
            times[row.case.device, mode][row.suite, row.case][row.impl] = statistics.median(row.samples_s)
    found = []
    for (device, mode), cases in sorted(times.items()):
        names = {name for by_name in cases.values() for name in by_name}
        most = max(len(by_name) for by_name in cases.values())
        ratios: dict[str, list[float]] = defaultdict(list)
        for by_name in cases.values():
            if 2 * len(by_name) >= min(len(names), 2 * most):
                fastest, slowest = min(by_name.values()), max(by_name.values())
                for name in names:
                    ratios[name].append(math.log(by_name.get(name, slowest) / fastest))
        order = sorted(ratios, key=lambda name: statistics.mean(ratios[name]))
        found.append((device, mode, " ".join(order)))
    if not found:
        raise UserError(
            "no row is a time of local attention on this machine: run a suite such as kernel_size here first"
        )
    file = file or own_file()
    text = io.StringIO()
    csv.writer(text).writerows([("device", "mode", "implementations"), *found])
    replace_text(file, text.getvalue())
    _orders.cache_clear()
    return file


def exporters(library: bool) -> list[str]:
    """The implementations that run exported files, best first: with a library of custom operators, or without."""
    order = _orders()[0].get(("export", "forward"), ())
    files = [name for name in impls.names() if (impl := _found(name)) and impl.exported is not None]
    known = [*(name for name in order if name in files), *(name for name in files if name not in order)]
    return [name for name in known if impls.get(name).info.library == library]


def _found(name: str) -> Impl | None:
    try:
        return impls.get(name)
    except ImportError:
        return None


def explain() -> Iterator[str]:
    """Lines for `sasa-bench doctor`: what auto runs on this machine."""
    window = Window(7, 7, 8, "mask")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for grad in (False, True):
                chosen = choose(Use(device, dtype, grad), window)
                words = f"{device} {str(dtype).removeprefix('torch.')} {'training' if grad else 'forward'}"
                yield f"{words}: {chosen.name}, {chosen.reason}"


@lru_cache
def _orders() -> tuple[dict[tuple[str, str], tuple[str, ...]], str]:
    own = own_file()
    committed = _read(COMMITTED)
    if measured := _read(own):
        return committed | measured, f"this machine's measurements in {own}"
    return committed, "the committed order"


def _read(file: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            return {
                (row["device"], row["mode"]): tuple(row["implementations"].split()) for row in csv.DictReader(lines)
            }
    except (OSError, KeyError, AttributeError):
        return {}


@lru_cache
def _all() -> tuple[str, ...]:
    """Every implementation with a core of its own that models can run."""
    return tuple(name for name in impls.BUILTIN if _has_core(name))


def _has_core(name: str) -> bool:
    impl = _found(name)
    return impl is not None and impl.core is not None


class _Loaded:
    """Implementations that are loaded, as attributes."""


LOADED = _Loaded()
"""For torch.compile, which looks an attribute up again in each layer but remembers a dict as the first layer saw it."""

READY: dict[str, Impl] = vars(LOADED)
"""The same by name."""


def ready(name: str, use: Use | None, window: Window, refused: Mapping[str, str] | None = None) -> str:
    """The name of an implementation in READY: `name`, or what is chosen for `use` where it is "auto"; see `choose`.

    Raises RuntimeError with what is missing on this machine.
    """
    if name == AUTO:
        assert use is not None
        name = choose(use, window, refused).name
    if name not in READY:
        impl = impls.get(name)
        if impl.core is not None:
            if reason := impl.missing():
                raise RuntimeError(reason)
            impl.core.load()
        READY[name] = impl
    return name


def ready_in_trace(name: str, use: Use, window: Window) -> str:
    """As `ready`, while a compiler traces: the implementation prepares the compiler too, unless for an export."""
    found = ready(name, use, window)
    core = READY[found].core
    if core is not None and not use.exported:
        core.compiled()
    return found
