"""A made-up stream of a GPU, whose clock moves only when work runs."""

from __future__ import annotations

from typing import Any

from fake_nvml import FakeNvml

from sasa_bench.timing import nvml
from sasa_bench.timing.cuda import Device
from sasa_bench.timing.timers import Step

FLUSH_S = 0.003


class Stream:
    """Work in the order it was queued; `warm` says whether the last thing that ran was a call, not a flush."""

    def __init__(self, library: FakeNvml | None = None) -> None:
        self.now_s = 0.0
        self.warm: object = None
        self.queued: list[str] = []
        self.library = library
        self.queue_s = 0.0
        self.paused_s = 0.0

    def step(self, name: str, hot_s: float, cold_s: float) -> Step:
        def call() -> None:
            self.queued.append(name)
            self.run(hot_s if self.warm == name else cold_s)
            self.warm = name

        return call

    def run(self, seconds: float) -> None:
        self.now_s += seconds
        if self.library is not None:
            self.library.millijoules += round(seconds * 250_000)

    def pause(self, seconds: float) -> None:
        self.queued.append("pause")
        self.paused_s = seconds
        self.now_s += seconds

    def capture(self, step: Step) -> Step:
        return step

    def flush(self) -> None:
        self.queued.append("flush")
        self.run(FLUSH_S)
        self.warm = None

    def event(self) -> Any:
        stream = self

        class Event:
            def record(self) -> None:
                stream.queued.append("event")
                self.at_s = stream.now_s

            def synchronize(self) -> None:
                stream.queued.append("synchronize")

            def elapsed_time(self, end: Any) -> float:
                return (end.at_s - self.at_s) * 1e3

        return Event()

    def device(self) -> Device:
        watch = nvml.find(library=self.library) if self.library is not None else None
        wait = lambda: self.queued.append("synchronize")  # noqa: E731
        return Device(self.event, self.flush, self.pause, self.capture, wait, watch)
