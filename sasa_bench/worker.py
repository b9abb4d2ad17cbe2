"""A child process that builds, checks and measures on request; what kills it costs one row, not the run.

Parent and child exchange JSON lines: requests on the child's standard input, events on a pipe of their own. Before each
risky stage the child announces it, so that the parent knows whom to blame for a crash and how long to wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sasa_bench.case import Case, UserError, from_dict
from sasa_bench.machine import WORKER_ENVIRONMENT

if TYPE_CHECKING:
    from sasa_bench.measurement import Settings, Step

STAGES = ("start", "build", "check", "memory", "time")
BUILD_TIMEOUT_S = 900.0
"""Starting and building may compile native code."""


class WorkerDied(Exception):
    """The child ended or had to be ended. `status` is the row's, `reason` its sentence, `impl` who was at it."""

    def __init__(self, status: str, reason: str, impl: str | None, stage: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.impl, self.stage = status, reason, impl, stage


class WorkerRefused(UserError):
    """The child could not answer a question; the message says why."""


@dataclass(frozen=True)
class Request:
    """Measure `case` with these implementations, interleaved; the settings are those of measure.Settings."""

    case: Case
    impls: tuple[str, ...]
    seed: int
    settings: dict[str, Any]


class Worker:
    """The parent's side. `spent_s` holds the seconds that each stage has taken so far."""

    def __init__(
        self,
        timeout_s: float,
        command: Sequence[str] = (sys.executable, "-m", "sasa_bench.worker"),
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.spent_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        read_end, write_end = os.pipe()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [*command, str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=(write_end,),
            cwd=cwd,
            env=os.environ | WORKER_ENVIRONMENT | dict(environment or {}),
            start_new_session=True,
        )
        os.close(write_end)
        self.pipe = read_end
        self.buffer = b""

    def measure(self, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
        """(implementation, its Record fields) for each one of the request. Raises WorkerDied."""
        message = asdict(request) | {"case": request.case.to_dict(), "do": "measure"}
        for event in self._ask(message):
            if event["event"] == "row":
                yield event["impl"], event["row"]

    def ask(self, do: str, **values: Any) -> Any:
        """The answer to a question. Raises WorkerDied, or WorkerRefused with the child's reason."""
        return self._answer(do, self._ask({"do": do} | values))

    def send(self, do: str, **values: Any) -> Callable[[], Any]:
        """Send a question now; the call that comes back waits for its answer and raises as `ask` does."""
        self._write({"do": do} | values)
        return lambda: self._answer(do, self._events())

    def _answer(self, do: str, events: Iterator[dict[str, Any]]) -> Any:
        answer = None
        for event in events:
            if event["event"] == "answer":
                answer = event["answer"]
            elif event["event"] == "failed":
                raise WorkerRefused(event["reason"])
        if answer is not None:
            return answer
        raise WorkerDied("error", f"the worker gave no answer to {do!r}", None, "start")

    def _ask(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._write(message)
        yield from self._events()

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._autopsy(None, "start") from None

    def _events(self) -> Iterator[dict[str, Any]]:
        impl, stage = None, "start"
        while True:
            limit = max(self.timeout_s, BUILD_TIMEOUT_S) if stage in ("start", "build") else self.timeout_s
            since = time.monotonic()
            line = self._line(since + limit)
            self.spent_s[stage] += time.monotonic() - since
            if line is None:
                self.kill()
                reason = f"stage {stage!r} took longer than {limit:g} s and was stopped; --timeout allows more"
                raise WorkerDied("timeout", reason, impl, stage)
            if not line:
                raise self._autopsy(impl, stage)
            event = json.loads(line)
            if event["event"] == "done":
                return
            if event["event"] == "stage":
                impl, stage = event["impl"], event["stage"]
            yield event

    def _line(self, deadline: float) -> bytes | None:
        """The next line, b"" at the end of the pipe, None when the deadline passes."""
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(self.pipe, 1 << 16)
            if not chunk:
                return b""
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _autopsy(self, impl: str | None, stage: str) -> WorkerDied:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            cause = f"the worker was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                cause += " (out of memory, as a rule)"
        else:
            cause = f"the worker ended with exit status {code}"
        last = f": {said[-1]}" if said else ""
        return WorkerDied("error", f"{cause} in stage {stage!r}{last}", impl, stage)

    def kill(self) -> None:
        """End the child and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End the child and close the pipes."""
        self.kill()
        os.close(self.pipe)
        self.errors.close()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def main(events_fd: int) -> None:
    """The child's side: answer requests until the parent goes away."""
    _die_with_parent()
    events = os.fdopen(events_fd, "w", buffering=1)

    def send(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event} | values) + "\n")

    for line in sys.stdin:
        message = json.loads(line)
        do = message.pop("do")
        if do == "measure":
            request = Request(from_dict(message.pop("case")), tuple(message.pop("impls")), **message)
            for impl, row in _measure(request, lambda impl, stage: send("stage", impl=impl, stage=stage)):
                send("row", impl=impl, row=row)
        else:
            try:
                send("answer", answer=_question(do)(**message))
            except Exception as error:
                send("failed", reason=str(error))
        send("done")


def _measure(request: Request, stage: Callable[[str, str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch

    from sasa_bench.measurement import Settings, peak_memory
    from sasa_bench.trial import Oracles, first_line, prepare

    _freeze_imports()
    case, settings = request.case, Settings(**request.settings)
    torch.set_num_threads(case.threads)
    torch.manual_seed(request.seed)
    oracles: Oracles = {}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    at = ""

    def announce(name: str, what: str = "time") -> None:
        nonlocal at
        at = name
        stage(name, what)

    for name in request.impls:
        announce(name, "start")
        trial = prepare(name, case, request.seed, partial(stage, name), oracles)
        if trial.step is None:
            yield name, trial.row
        else:
            rows[name], steps[name] = trial.row, trial.step
    oracles.clear()
    while steps:
        try:
            for name, step in steps.items():
                announce(name, "memory")
                step()
                rows[name]["peak_memory_bytes"], rows[name]["memory_source"] = peak_memory(step, case.device)
            found = _sample(case.device, steps, settings, announce, request.seed)
        except Exception as error:
            del steps[at]
            yield at, rows.pop(at) | {"status": "error", "reason": first_line(error)}
            continue
        for name, row in rows.items():
            yield name, row | found[name] | {"extra": row["extra"] | found[name].get("extra", {})}
        return


@cache
def _freeze_imports() -> None:
    # Garbage is collected before memory is measured: torch's own objects would make each time last 0.2 s.
    gc.collect()
    gc.freeze()


def _sample(
    device: str, steps: Mapping[str, Step], settings: Settings, announce: Callable[[str], None], seed: int
) -> dict[str, dict[str, Any]]:
    """Record fields of each step, by name."""
    from sasa_bench.measurement import interleave, timer_for

    if device == "cuda":
        from sasa_bench import gpu

        return gpu.sample(gpu.current(), steps, settings, announce, seed)
    samples = interleave(timer_for(device), steps, settings, announce, seed)
    return {name: {"samples_s": found.seconds, "inner_count": found.inner_count} for name, found in samples.items()}


def _roof(device: str, dtype: str, threads: int) -> list[float]:
    import torch

    from sasa_bench.measurement import roof

    torch.set_num_threads(threads)
    return list(roof(device, dtype))


def _describe(impls: list[str] | None = None, details: bool = False) -> list[dict[str, Any]]:
    from sasa_bench import impls as registry

    found = []
    for name in impls or registry.names():
        impl = registry.get(name)
        info: dict[str, Any] = asdict(registry.info(impl))
        try:
            info["missing"] = impl.missing()
        except Exception as error:
            info["missing"] = str(error)
        try:
            info["details"] = impl.details() if details else []
        except Exception as error:
            info["details"] = [f"no details: {error}"]
        found.append(info)
    return found


def _profile(impl: str, case: dict[str, Any], folder: str) -> dict[str, Any]:
    from sasa_bench.profile import capture

    return capture(impl, from_dict(case), Path(folder))


def _question(do: str) -> Callable[..., Any]:
    from sasa_bench.turns import TURNS

    questions: dict[str, Callable[..., Any]] = {**TURNS, "roof": _roof, "describe": _describe, "profile": _profile}
    return questions[do]


def _die_with_parent() -> None:
    # Who ends a whole group of processes means the run: the parent, which must not take it for a crash of the case.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    random.seed()
    main(int(sys.argv[1]))
