"""The parent's side of a worker: a child process that measures on request; what kills it costs one row, not the run.

Parent and child (timing.child) exchange JSON lines: requests on the child's standard input, events on a pipe of their
own. Before each risky stage the child announces it, so that the parent knows which implementation crashed and how long
to wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from sasa_bench.case import Case, UserError
from sasa_bench.results.environment import worker_environment
from sasa_bench.results.fields import printable

STAGES = ("start", "build", "check", "memory", "time")
BUILD_TIMEOUT_S = 900.0
"""Starting and building may compile native code."""


def python(module: str) -> tuple[str, ...]:
    """The command that runs a module of this sasa-bench, whatever modules lie in the current folder."""
    root = str(Path(__file__).parents[2])
    code = f"import runpy, sys\n{root!r} in sys.path or sys.path.insert(0, {root!r})\n"
    return sys.executable, "-P", "-c", code + f"runpy.run_module({module!r}, run_name='__main__')"


class WorkerDied(Exception):
    """The child ended or had to be ended: `status` and `reason` of the row of `impl`, which was running in `stage`."""

    def __init__(self, status: str, reason: str, impl: str | None, stage: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.impl, self.stage = status, reason, impl, stage


class WorkerRefused(UserError):
    """The child could not answer a question; the message states why."""


@dataclass(frozen=True)
class Request:
    """Measure `case` with these implementations, interleaved; `settings` are the fields of settings.Settings.

    Without `check` they are not checked: they were, in an earlier worker, on the tensors of the same seed.
    """

    case: Case
    impls: tuple[str, ...]
    seed: int
    settings: dict[str, Any]
    check: bool = True


class Worker:
    """The parent's side. `spent_s` holds the seconds that each stage has taken so far."""

    def __init__(
        self,
        timeout_s: float,
        command: Sequence[str] = python("sasa_bench.worker"),
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
            env=os.environ | worker_environment() | dict(environment or {}),
            start_new_session=True,
        )
        os.close(write_end)
        self.pipe = read_end
        self.buffer = b""

    def measure(self, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
        """(implementation, its Record fields) for each one of the request. Raises WorkerDied."""
        message = asdict(request) | {"case": request.case.to_dict(), "do": "measure"}
        self._write(message)
        for event in self._events():
            if event["event"] == "row":
                yield event["impl"], event["row"]

    def ask(self, do: str, *, limit_s: float | None = None, **values: Any) -> Any:
        """The answer to a question. Raises WorkerDied, also after `limit_s`, or WorkerRefused with the child's reason.

        Without a limit, it may take as long as a build.
        """
        self._write({"do": do} | values)
        return self._answer(do, self._events(do, limit_s))

    def send(self, do: str, **values: Any) -> Callable[[], Any]:
        """Send a question now; the call that comes back waits for its answer and raises as `ask` does."""
        try:
            self._write({"do": do} | values)
        except WorkerDied as death:
            lost = death  # for whoever asks for the answer, since other workers may be asked meanwhile

            def raise_it() -> Any:
                raise lost

            return raise_it
        return lambda: self._answer(do, self._events(do))

    def _answer(self, do: str, events: Iterator[dict[str, Any]]) -> Any:
        answer, refusal = None, None
        for event in events:  # to their end, or the next question would get what is left of this one
            if event["event"] == "answer":
                answer = event["answer"]
            elif event["event"] == "failed":
                refusal = event["reason"]
        if refusal is not None:
            raise WorkerRefused(refusal)
        if answer is not None:
            return answer
        raise WorkerDied("error", f"the worker returned no answer to {do!r}", None, "start")

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death(None, "start") from None

    def _events(self, do: str = "", limit_s: float | None = None) -> Iterator[dict[str, Any]]:
        impl, stage = None, "start"
        while True:
            longest = max(self.timeout_s, BUILD_TIMEOUT_S) if stage in ("start", "build") else self.timeout_s
            limit = longest if limit_s is None else limit_s
            since = time.monotonic()
            line = self._line(since + limit)
            self.spent_s[stage] += time.monotonic() - since
            if line is None:
                self.kill()
                what = f"request {do!r}" if do else f"stage {stage!r}"
                reason = f"{what} took longer than {limit:g} s and was stopped; --timeout allows more"
                raise WorkerDied("timeout", reason, impl, stage)
            if not line:
                raise self._death(impl, stage)
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

    def _death(self, impl: str | None, stage: str) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):  # what closed its pipe may live on
            self.process.wait(timeout=10)
        self.kill()
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            cause = f"the worker was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                cause += " (usually out of memory)"
        else:
            cause = f"the worker ended with exit status {code}"
        last = f": {printable(said[-1])}" if said else ""
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
