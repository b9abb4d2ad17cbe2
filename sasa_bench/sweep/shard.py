"""Sweeps in parts: cut suites into tasks of about equal cost; results.merge joins the files that the parts leave.

A group of rows that are compared with each other (all implementations of one case, both revisions of a pair) is never
split. A cut depends on suites and implementations alone, so that every machine of a CI matrix cuts alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.results.record import ImplInfo
from sasa_bench.suite import Suite, SuiteError

Group = TypeVar("Group")

ROW_S = 0.9
"""Seconds of a row however small: its samples, and building, checking and warming up."""
CALLS = 12
"""Calls that a slow row takes outside its time budget: check, memory, calibration and the least number of samples."""
RATE_FLOPS_PER_S = {"cpu": 2e10, "cuda": 2e12}
"""A middling implementation on a middling machine; only the balance between tasks depends on it."""


def expected_s(case: Case, computed: Sequence[str]) -> float:
    """Seconds that `case` is expected to take, with the op of each implementation in `computed`.

    It looks at the FLOPs of the op, not at who implements it, and at nothing of this machine.
    """
    flops = sum(ops.get(op).cost(case).flops for op in computed if op in ops.BUILTIN)
    return len(computed) * ROW_S + CALLS * flops / RATE_FLOPS_PER_S[case.device]


def spread(groups: Sequence[Group], count: int, cost_of: Callable[[Group], float]) -> list[list[Group]]:
    """Deal `groups` to `count` tasks of about equal cost; each group goes whole to exactly one task.

    The dearest group goes first, each to the task with the least cost so far: the dearest task exceeds the best
    possible by a third at most. Tasks keep the order of `groups`; with fewer groups than tasks some stay empty. The
    result depends on the arguments alone.
    """
    costs = [cost_of(group) for group in groups]
    tasks = [(0.0, number) for number in range(count)]
    owner = {}
    for index in sorted(range(len(groups)), key=lambda i: (-costs[i], i)):
        load, number = heapq.heappop(tasks)
        owner[index] = number
        heapq.heappush(tasks, (load + costs[index], number))
    dealt: list[list[Group]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        dealt[owner[index]].append(group)
    return dealt


def cut(
    suites: Sequence[Suite], count: int, impls: Sequence[str], infos: Mapping[str, ImplInfo]
) -> list[tuple[Suite, ...]]:
    """`count` shards, each the suites with the cases that fall to it; a case stays whole.

    `impls` replaces the implementations of the suites, where given; `infos` knows the op of each.
    """
    computed = {suite.name: [infos[impl].op for impl in impls or suite.impls] for suite in suites}
    groups = [(suite.name, case) for suite in suites for case in suite.cases]
    dealt = spread(groups, count, lambda group: expected_s(group[1], computed[group[0]]))
    return [
        tuple(_subset(suite, task) for suite in suites if any(name == suite.name for name, _ in task)) for task in dealt
    ]


def _subset(suite: Suite, task: Sequence[tuple[str, Case]]) -> Suite:
    return replace(suite, cases=tuple(case for name, case in task if name == suite.name))


def require_one_meaning_of_threads(suites: Sequence[Suite]) -> None:
    """Raise SuiteError where cases differ only in threads and one asks for every core (0).

    How many cores that is differs from node to node, so the two might turn out to be one case, measured twice.
    """
    for suite in suites:
        every_core = {case for case in suite.cases if case.threads == 0}
        for case in suite.cases:
            if case.threads and case.with_(threads=0) in every_core:
                raise SuiteError(
                    f"{suite.name} sweeps threads = 0 (every core) next to threads = {case.threads}; on another "
                    "machine these may be the same: give numbers only, -c threads=1,2,4"
                )
