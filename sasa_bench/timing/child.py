"""The child's side of a worker: it builds, checks and measures what the parent asks for."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_bench.case import Case, from_dict
from sasa_bench.results.environment import WORKER_ENVIRONMENT, absent
from sasa_bench.results.fields import first_line
from sasa_bench.results.record import ImplInfo
from sasa_bench.timing.process import Request

if TYPE_CHECKING:
    from sasa_bench.impls._native import Library
    from sasa_bench.timing.proof import Feed
    from sasa_bench.timing.settings import Settings
    from sasa_bench.timing.timers import Step


def main(events_fd: int) -> None:
    """The child's side: answer requests until the parent goes away."""
    _die_with_parent()
    keep_heap()
    events = os.fdopen(events_fd, "w", buffering=1)

    def send(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event} | values) + "\n")

    for line in sys.stdin:
        message = json.loads(line)
        do = message.pop("do")
        if do == "measure":
            request = Request(from_dict(message.pop("case")), tuple(message.pop("impls")), **message)
            sources = {impl: _source(impl) for impl in request.impls}
            for impl, row in _measure(request, lambda impl, stage: send("stage", impl=impl, stage=stage)):
                send("row", impl=impl, row=row | {"extra": row.get("extra", {}) | sources[impl]})
        else:
            try:
                send("answer", answer=_request(do)(**message))
            except Exception as error:
                send("failed", reason=(isinstance(error, ImportError) and absent(error)) or str(error))
        send("done")


def _source(impl: str) -> dict[str, str]:
    """What a row says of the file of an implementation, as it is now; a run compares it with what it was."""
    from sasa_bench.impls import registry

    with contextlib.suppress(Exception):  # its row will say what
        if digest := registry.digest(impl):
            return {"source_digest": digest}
    return {}


def _measure(request: Request, stage: Callable[[str, str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch

    from sasa_bench.timing import switches
    from sasa_bench.timing.memory import WITHOUT_GRAPH, peak_memory
    from sasa_bench.timing.prepared import References, prepare
    from sasa_bench.timing.proof import proved
    from sasa_bench.timing.settings import Settings

    _freeze_imports()
    case, settings = request.case, Settings(**request.settings)
    switched = switches.apply(case)
    torch.manual_seed(request.seed)
    references: References = {}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    feeds: dict[str, Feed] = {}
    at = ""

    def announce(name: str, what: str = "time") -> None:
        nonlocal at
        at = name
        stage(name, what)

    _compile_together(request, announce)
    for name in request.impls:
        announce(name, "start")
        prepared = prepare(name, case, request.seed, partial(stage, name), references, request.check)
        if prepared.row["status"] == "error":
            _end_if_broken(case.device, prepared.row["reason"])
        try:
            if prepared.step is not None and prepared.feed is not None:
                feeds[name] = prepared.feed()
        except Exception as error:
            _end_if_broken(case.device, first_line(error))
            yield name, prepared.row | {"status": "error", "reason": first_line(error)}
            continue
        if prepared.step is None:
            yield name, prepared.row
        else:
            rows[name], steps[name] = prepared.row, prepared.step
    references.clear()
    while steps:
        try:
            for name, step in steps.items():
                if not request.check:  # the first worker's figure stands
                    break
                announce(name, "memory")
                peak, source = peak_memory(step, case.device)
                source += WITHOUT_GRAPH if case.mode == "backward" else ""
                rows[name] |= {"peak_memory_bytes": peak, "memory_source": source}
            found = _sample(case, steps, feeds, settings, announce, request.seed)
            found = proved(found, case, rows, steps, feeds, announce)
        except Exception as error:
            _end_if_broken(case.device, first_line(error))
            del steps[at]
            yield at, rows.pop(at) | {"status": "error", "reason": first_line(error)}
            continue
        for name, row in rows.items():
            yield name, row | found[name] | {"extra": row.get("extra", {}) | found[name].get("extra", {}) | switched}
        return


def _compile_together(request: Request, announce: Callable[[str, str], None]) -> None:
    """Compile the native code of all implementations at once; what does not compile says so when it is built."""
    if owners := _not_compiled(request.case, request.impls):
        announce(next(iter(owners.values())), "build")
        _compile_all(owners)


def _not_compiled(case: Case, names: Sequence[str]) -> dict[Library, str]:
    """The native libraries that a case needs and that are not there, with an implementation that needs each."""
    from sasa_bench import impls

    owners: dict[Library, str] = {}
    for name in names:
        with contextlib.suppress(Exception):
            impl = impls.get(name)
            if not (impl.supports(case) or impl.missing()):
                owners |= {library: name for library in impl.info.native(case) if not library.is_built()}
    return owners


def _compile_all(libraries: Iterable[Library]) -> None:
    from sasa_bench.impls import _native

    with contextlib.suppress(RuntimeError):
        _native.build(list(libraries))


def _compile(cases: list[tuple[dict[str, Any], list[str]]]) -> bool:
    """Compile the native code that these cases need of these implementations."""
    _compile_all({library: None for fields, names in cases for library in _not_compiled(from_dict(fields), names)})
    return True


def _make_ahead(case: dict[str, Any], impl: str, seed: int) -> bool:
    """Make what an implementation has made ahead for a case; see Impl.ahead. Raises what that raises."""
    from sasa_bench import impls
    from sasa_bench.ops.tensors import leaves, random_tensors
    from sasa_bench.timing import switches

    known = impls.get(impl)
    asked = from_dict(case)
    computed = known.computes(asked)
    if known.ahead is None or switches.unfit(asked) or known.supports(asked) or known.missing():
        return False
    known.ahead(computed, leaves(random_tensors(known.op, computed, seed), computed))
    return True


def _end_if_broken(device: str, reason: str) -> None:
    """End this process where an error has broken the device; the parent records which implementation was running."""
    if device == "cuda":
        from sasa_bench.timing import cuda as gpu

        if gpu.broken(device):
            print(f"{reason}; it broke the CUDA context, so this worker ended", file=sys.stderr, flush=True)
            os._exit(1)


@cache
def _freeze_imports() -> None:
    # Garbage is collected before memory is measured: torch's own objects would make each time last 0.2 s.
    gc.collect()
    gc.freeze()


def _sample(
    case: Case,
    steps: Mapping[str, Step],
    feeds: Mapping[str, Feed],
    settings: Settings,
    announce: Callable[[str], None],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Record fields of each step, by name."""
    if case.device == "cuda":
        from sasa_bench.timing import cuda as gpu

        return gpu.sample(gpu.current(), steps, settings, announce, seed, graphs=case.mode != "backward")
    from sasa_bench.timing import cpu

    return cpu.sample(steps, feeds, settings, announce, seed)


def _roof(device: str, dtype: str, threads: int) -> list[float]:
    from sasa_bench.timing import switches
    from sasa_bench.timing.roof import roof

    switches.apply(Case(device=device, dtype=dtype, threads=threads))
    return list(roof(device, dtype))


def _describe(impls: list[str] | None = None, details: bool = False) -> list[dict[str, Any]]:
    from sasa_bench import impls as registry

    found = []
    for name in impls or registry.names():
        try:
            impl = registry.get(name)
        except registry.UnknownImplError as error:
            if impls:
                raise
            found.append(_unusable(name, str(error)))
            continue
        info: dict[str, Any] = asdict(registry.info(impl)) | registry.source(name)
        try:
            info["missing"] = impl.missing()
        except Exception as error:
            info["missing"] = str(error)
        try:
            info["details"] = impl.info.details() if details else []
        except Exception as error:
            info["details"] = [f"no details: {error}"]
        found.append(info)
    return found if impls else found + [_unusable(name, why) for name, why in registry.unused().items()]


def _unusable(name: str, why: str) -> dict[str, Any]:
    """The answer about an entry point of another package that cannot be used."""
    return asdict(ImplInfo(name, "", why, -1)) | {"missing": why, "details": []}


def _profile(impl: str, case: dict[str, Any], folder: str) -> dict[str, Any]:
    from sasa_bench.timing.capture import capture

    return capture(impl, from_dict(case), Path(folder))


def _request(do: str) -> Callable[..., Any]:
    from sasa_bench.timing.blocks import REQUESTS

    requests: dict[str, Callable[..., Any]] = {
        **REQUESTS,
        "roof": _roof,
        "describe": _describe,
        "profile": _profile,
        "compile": _compile,
        "make_ahead": _make_ahead,
    }
    return requests[do]


M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
"""Parameters of mallopt(3)."""


def keep_heap(mallopt: Callable[[int, int], int] | None = None) -> str:
    """See that large buffers come from a heap that is kept; what was set for it, "" where the C library has no mallopt.

    The variables that the worker was started with ask for the same, but an old glibc takes them without effect.
    """
    try:
        function = mallopt or ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return ""
    if function(M_MMAP_THRESHOLD, int(WORKER_ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"])):
        return "threshold"
    return "without mmap" if function(M_MMAP_MAX, 0) else ""


def _die_with_parent() -> None:
    # Who ends a whole group of processes means the run: the parent, which must not take it for a crash of the case.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
