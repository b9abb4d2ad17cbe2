"""The gate over a Slurm cluster: the cases are spread over the tasks of an array job, the arms of a pair never are.

A task screens its cases and confirms its own suspects on one node, and leaves its evidence in the shared folder. The
submitter decides once, over the suspects of all tasks. That needs no second submission: which pairs a suspect gets does
not depend on how many suspects there are; only the level of the test does, and Holm shares it when all are known.
"""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sasa_bench import ops
from sasa_bench.case import from_dict
from sasa_bench.gate.arms import Arm, verify
from sasa_bench.gate.decision import Result, decide
from sasa_bench.gate.evidence import Evidence
from sasa_bench.gate.pairs import BLOCK_S, BLOCKS, Point, require_known, started, survey
from sasa_bench.gate.relink import BUILT
from sasa_bench.gate.run import Gate
from sasa_bench.gate.verdicts import Rules
from sasa_bench.sweep.cluster import (
    MOST_TASKS,
    STRIKES,
    Options,
    Progress,
    SlurmError,
    cancel,
    drive,
    last_words,
    locked,
    read_plan,
    write_whole,
)
from sasa_bench.sweep.shard import RATE_FLOPS_PER_S, spread
from sasa_bench.timing.probe import available_cores, detect
from sasa_bench.timing.process import WorkerRefused

SCREEN_SHARE = 0.25
"""Of the time budget of a task: what screening is expected to take where the number of tasks is not given."""
PREPARE_S = 0.1
"""Seconds in which a fresh process prepares a case, however small."""


@dataclass(frozen=True)
class Plan:
    """A gate in tasks, as plan.json in `folder` holds it: the points of each, and how to measure them.

    The arms lie where all nodes see them. A case that asks for 0 threads gets every core of the node that measures it.
    """

    folder: Path
    name: str
    arms: tuple[Arm, ...]
    shards: tuple[tuple[Point, ...], ...]
    rules: Rules
    budget_s: float
    timeout_s: float
    layout: str = BUILT

    def file(self, index: int) -> Path:
        """The evidence of a task: there whole or not at all."""
        return self.folder / f"{index:04}.json"

    def missing(self) -> dict[int, int]:
        """How many points the tasks have that left no evidence yet."""
        return {index: len(shard) for index, shard in enumerate(self.shards) if not self.file(index).exists()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "arms": [arm.to_dict() for arm in self.arms],
            "shards": [[[point.impl, point.case.to_dict()] for point in shard] for shard in self.shards],
            "rules": asdict(self.rules),
            "budget_s": self.budget_s,
            "timeout_s": self.timeout_s,
            "layout": self.layout,
        }


def load(folder: Path) -> Plan:
    """The gate in `folder`."""
    plan = read_plan(folder)
    return Plan(
        folder,
        plan["name"],
        tuple(Arm.from_dict(arm) for arm in plan["arms"]),
        tuple(tuple(Point(impl, from_dict(case)) for impl, case in shard) for shard in plan["shards"]),
        Rules(**plan["rules"]),
        plan["budget_s"],
        plan["timeout_s"],
        plan["layout"],
    )


def require_room(folder: Path, options: Options, budget_s: float) -> None:
    """Raise SlurmError where `folder` holds a gate already, or Slurm's limit would end a task before `budget_s`."""
    if (folder / "tasks").exists():
        raise SlurmError(f"{folder} holds the tasks of an earlier gate, which may still run: give another --out")
    if options.minutes * 60 <= budget_s:
        raise SlurmError(
            f"--slurm time={options.minutes} (minutes) ends a task before --budget {budget_s:g} (seconds), "
            "and a task that is cut off starts again: give more time or less budget"
        )


def prepare(
    folder: Path,
    arms: Sequence[Arm],
    points: Sequence[Point],
    rules: Rules,
    options: Options,
    budget_s: float,
    timeout_s: float,
    layout: str = BUILT,
) -> Plan:
    """Spread the points over tasks and write the plan to `folder`/tasks."""
    ops = _ops(arms, list(dict.fromkeys(point.impl for point in points)), timeout_s)
    costs = {point.key: screen_s(point, ops[point.impl], rules) for point in points}
    wanted = math.ceil(sum(costs.values()) / (SCREEN_SHARE * budget_s))
    count = options.tasks or min(MOST_TASKS, wanted)
    dealt = spread(points, count, lambda point: costs[point.key])
    shards = tuple(tuple(shard) for shard in dealt if shard)
    name = f"sasa-bench-gate-{uuid.uuid4().hex[:8]}"
    plan = Plan((folder / "tasks").absolute(), name, tuple(arms), shards, rules, budget_s, timeout_s, layout)
    plan.folder.mkdir(parents=True)
    write_whole(plan.folder / "plan.json", plan.to_dict())
    return plan


def screen_s(point: Point, op: str, rules: Rules) -> float:
    """Seconds that the screen of `point` is expected to take, by the FLOPs of `op` whoever implements it."""
    flops = ops.get(op).cost(point.case).flops if op in ops.BUILTIN else 0
    block_s = max(BLOCK_S, flops / RATE_FLOPS_PER_S[point.case.device])
    return rules.screen_pairs * 3 * (PREPARE_S + BLOCKS * block_s)


def _ops(arms: Sequence[Arm], impls: Sequence[str], timeout_s: float) -> dict[str, str]:
    """The op of each implementation, as head knows it; empty for one that base alone has.

    Raises ArmError for one that no arm has.
    """
    head = arms[1]
    ops = dict.fromkeys(impls, "")
    unknown: dict[str, str] = {}
    with started(head, timeout_s) as worker:
        verify(head, worker.ask("loaded"))
        for impl in impls:
            try:
                ops[impl] = worker.ask("describe", impls=[head.impl(impl)])[0]["op"]
            except WorkerRefused as error:
                unknown[impl] = str(error)
    if unknown:
        require_known([survey(arms[0], list(unknown), timeout_s)[1], unknown])
    return ops


@dataclass(frozen=True)
class Task:
    """The work of one task: what the gate measures of the points of a shard, in both arms and the copy of base."""

    folder: Path

    def __call__(self, index: int) -> None:
        """Runs on a node. Started again it measures everything again: no case has pairs of two nodes."""
        plan = load(self.folder)
        path = plan.file(index)
        with locked(path.with_suffix(".lock")):
            if path.exists():
                return
            journal = path.with_suffix(".journal.jsonl")
            journal.unlink(missing_ok=True)
            cores = available_cores()
            points = [
                point if point.case.threads else replace(point, case=point.case.with_(threads=cores))
                for point in plan.shards[index]
            ]
            gate = Gate(
                plan.arms, points, plan.rules, plan.budget_s, plan.timeout_s, journal=journal, layout=plan.layout
            )
            found = gate.measure()
            found.node, found.machine = platform.node(), detect().hardware_id
            write_whole(path, found.to_dict())

    def checkpoint(self, index: int) -> Any:
        """Called before a time limit or pre-emption: the requeued task starts as this one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, index)


def run(plan: Plan, options: Options, report: Callable[[Progress], None]) -> Result:
    """Submit the tasks, wait for them, and decide.

    A task that dies is started again; the cases of one that is given up are INCONCLUSIVE. An exception, such as that of
    Ctrl-C, cancels the job. Raises SlurmError, and ArmError for an arm that was not the same on all nodes.
    """
    begun = time.monotonic()
    try:
        drive(plan.folder, plan.name, Task(plan.folder), plan.missing, options, report)
    except BaseException:
        cancel(plan.name)
        raise
    missing = plan.missing()
    evidence = {
        index: Evidence.from_dict(json.loads(plan.file(index).read_text(encoding="utf-8")))
        for index in range(len(plan.shards))
        if index not in missing
    }
    lost: dict[str, str] = {}
    for index in missing:
        reason = f"task {index} ended {STRIKES} times without a result; {last_words(plan.folder, index)}"
        lost |= {point.key: reason for point in plan.shards[index]}
    return decide(plan.arms, evidence, plan.rules, time.monotonic() - begun, lost)
