"""A child process that builds, checks and measures on request; what kills it costs one row, not the run.

Parent and child exchange JSON lines: requests on the child's standard input, events on a pipe of their own. Before each
risky stage the child announces it, so that the parent knows whom to blame for a crash and how long to wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from sasa_bench.case import Case, from_dict
from sasa_bench.machine import WORKER_ENVIRONMENT

STAGES = ("start", "build", "check", "memory", "time")
BUILD_TIMEOUT_S = 900.0
"""Starting and building may compile native code."""


class WorkerDied(Exception):
    """The child ended or had to be ended. `status` is the row's, `reason` its sentence, `impl` who was at it."""

    def __init__(self, status: str, reason: str, impl: str | None, stage: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.impl, self.stage = status, reason, impl, stage


class WorkerRefused(ValueError):
    """The child could not answer a question; the message says why."""


@dataclass(frozen=True)
class Request:
    """Measure `case` with these implementations, interleaved; the settings are those of measure.Settings."""

    case: Case
    impls: tuple[str, ...]
    seed: int
    settings: dict[str, Any]


class Worker:
    """The parent's side."""

    def __init__(self, timeout_s: float, command: Sequence[str] = (sys.executable, "-m", "sasa_bench.worker")) -> None:
        self.timeout_s = timeout_s
        read_end, write_end = os.pipe()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [*command, str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=(write_end,),
            env=os.environ | WORKER_ENVIRONMENT,
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
        """The answer to one of QUESTIONS. Raises WorkerDied, or WorkerRefused with the child's reason."""
        answer = None
        for event in self._ask({"do": do} | values):
            if event["event"] == "answer":
                answer = event["answer"]
            elif event["event"] == "failed":
                raise WorkerRefused(event["reason"])
        if answer is not None:
            return answer
        raise WorkerDied("error", f"the worker gave no answer to {do!r}", None, "start")

    def _ask(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        impl, stage = None, "start"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._autopsy(impl, stage) from None
        while True:
            limit = max(self.timeout_s, BUILD_TIMEOUT_S) if stage in ("start", "build") else self.timeout_s
            line = self._line(time.monotonic() + limit)
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
                send("answer", answer=QUESTIONS[do](**message))
            except Exception as error:
                send("failed", reason=str(error))
        send("done")


def _measure(request: Request, stage: Callable[[str, str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch

    from sasa_bench import impls
    from sasa_bench.check import Oracle, compare, consult, poisoned_memory
    from sasa_bench.flops import FORMULAS, cost
    from sasa_bench.measure import Settings, interleave, peak_memory, timer_for
    from sasa_bench.ops import leaves, step

    case, settings = request.case, Settings(**request.settings)
    torch.set_num_threads(case.threads)
    torch.manual_seed(request.seed)
    oracles: dict[tuple[str, Case], Oracle] = {}
    rows: dict[str, dict[str, Any]] = {}
    steps = {}
    for name in request.impls:
        stage(name, "start")
        row: dict[str, Any] = {"status": "ok", "reason": ""}
        try:
            impl = impls.get(name)
            computed = impl.computes(case)
            if impl.op.name in FORMULAS:
                row |= asdict(cost(impl.op.name, computed))
            reason = impl.supports(case) or _no_device(case) or impl.missing()
            if reason:
                yield name, row | {"status": "skipped", "reason": reason}
                continue
            stage(name, "check")
            key = (impl.op.name, computed)
            if key not in oracles:
                oracles[key] = consult(impl.op, computed, request.seed)
            oracle = oracles[key]
            tensors = leaves(oracle.tensors, computed)
            grad_y = None if oracle.grad_y is None else oracle.grad_y.to(tensors[next(iter(tensors))])
            stage(name, "build")
            with poisoned_memory():
                started = time.perf_counter()
                call = impl.build(computed, tensors)
                row["extra"] = {"build_s": time.perf_counter() - started}
                stage(name, "check")
                run = step(computed, call, tensors, grad_y)
                outputs = run()
            verdict = compare(oracle, outputs)
            del outputs
            row |= {"max_abs_err": _finite(verdict.max_abs_err), "err_budget": verdict.err_budget}
            if not verdict.ok:
                yield name, row | {"status": "wrong", "reason": verdict.reason}
                continue
            stage(name, "memory")
            run()
            row["peak_memory_bytes"], row["memory_source"] = peak_memory(run, case.device)
            rows[name], steps[name] = row, run
        except Exception as error:
            yield name, row | {"status": "error", "reason": _first_line(error)}
    oracles.clear()
    at = ""

    def announce(name: str) -> None:
        nonlocal at
        at = name
        stage(name, "time")

    while steps:
        try:
            samples = interleave(timer_for(case.device), steps, settings, announce, request.seed)
        except Exception as error:
            del steps[at]
            yield at, rows.pop(at) | {"status": "error", "reason": _first_line(error)}
            continue
        for name, row in rows.items():
            yield name, row | {"samples_s": samples[name].seconds, "inner_count": samples[name].inner_count}
        return


def _no_device(case: Case) -> str | None:
    import torch

    if case.device == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none on this machine"
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None


def _roof(device: str, dtype: str, threads: int) -> list[float]:
    import torch

    from sasa_bench.measure import roof

    torch.set_num_threads(threads)
    return list(roof(device, dtype))


def _describe(impls: list[str] | None = None) -> list[dict[str, Any]]:
    from sasa_bench import impls as registry

    found = []
    for name in impls or registry.names():
        impl = registry.get(name)
        info = {
            "name": impl.name,
            "op": impl.op.name,
            "summary": impl.summary,
            "index": registry.index(impl.name),
        }
        found.append(info | {"missing": impl.missing()})
    return found


QUESTIONS: dict[str, Callable[..., Any]] = {"roof": _roof, "describe": _describe}


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    random.seed()
    main(int(sys.argv[1]))
