"""Before the first measurement of a run: what takes seconds to make is made by several processes at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from sasa_bench.sweep.plan import Plan
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing.probe import available_cores
from sasa_bench.timing.process import WorkerDied, WorkerRefused

FEWEST = 4
"""Fewer exports than these take less time than the processes that would share them take to start."""
MOST_WORKERS = 4
"""Each holds torch and a graph, about 1 GB."""

Question = dict[str, Any]


def questions(work: Plan, seeds: Sequence[int]) -> list[Question]:
    """What workers are asked to make: native code of all cases together, then each export. Few exports: nothing."""
    exports = [
        {"do": "make_ahead", "case": task.case.to_dict(), "impl": spec, "seed": seed}
        for task, seed in zip(work.tasks, seeds, strict=True)
        for spec in task.impls
        if work.impls[spec].exports
    ]
    if len(exports) < FEWEST:
        return []
    return [{"do": "compile", "cases": [(task.case.to_dict(), task.impls) for task in work.tasks]}, *exports]


def make_ahead(work: Plan, seeds: Sequence[int], workers: Workers, say: Callable[[int], object]) -> None:
    """Have as many processes as there are cores make what the tasks of a plan need, before anything is timed.

    `workers` are those that will measure, `say` is told how many are not yet begun. What cannot be made is left to the
    worker that measures it, whose row then says why.
    """
    left = deque(questions(work, seeds))
    if not left:
        return
    began = time.monotonic()
    crew = [workers.another() for _ in range(min(MOST_WORKERS, available_cores(), len(left)))]
    with ThreadPoolExecutor(len(crew)) as pool:
        running = [pool.submit(_answer_all, left, one) for one in crew]
        try:
            while wait(running, timeout=0.5).not_done:
                say(len(left))
        except BaseException:
            left.clear()
            _end(running, crew)
            raise
    workers.count("build", time.monotonic() - began)


def _answer_all(left: deque[Question], workers: Workers) -> None:
    with workers:
        while left:
            with suppress(IndexError, WorkerRefused):
                try:
                    workers.get().ask(**left.popleft())
                except WorkerDied:
                    workers.drop()


def _end(running: Sequence[Future[None]], crew: Sequence[Workers]) -> None:
    while not all(future.done() for future in running):
        for workers in crew:
            if workers.worker is not None:
                workers.worker.kill()
        time.sleep(0.05)
