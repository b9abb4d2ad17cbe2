"""A gate in tasks: what is spread and what is not, one decision over all, and what becomes of tasks that die."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_bench import cli
from sasa_bench.case import Case
from sasa_bench.gate import cluster as gate_slurm
from sasa_bench.gate import outputs as gate_report
from sasa_bench.gate import run as gate
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.cluster import Plan, Task, load, prepare, require_room
from sasa_bench.gate.decision import Result, decide
from sasa_bench.gate.evidence import Evidence
from sasa_bench.gate.pairs import Pair, Point
from sasa_bench.gate.sources import ArmError
from sasa_bench.gate.verdicts import Rules
from sasa_bench.sweep import cluster as through
from sasa_bench.sweep.cluster import Options, SlurmError

ARMS = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]
POINTS = [Point(impl, Case(batch=batch)) for impl in ("unfold", "conv3x3") for batch in (1, 2, 3)]
RULES = Rules(screen_pairs=5, confirm_pairs=15)
ROW = {"status": "ok", "reason": "", "flops": 1, "params": 1, "operator_count": 1, "allocated_bytes": 1}
LOADED = {arm.name: {"digest": arm.name, "torch": "2", "python": "p"} for arm in ARMS}


def played(keys: Sequence[str], shift: dict[str, float], rules: Rules = RULES) -> Evidence:
    """Evidence as a task would leave it where `shift` slows head by so much."""
    found = Evidence(
        list(keys), dict(LOADED), {arm: {key: dict(ROW) for key in keys} for arm in ("base", "head")}, node="here"
    )

    def pair(some: Sequence[str]) -> Pair:
        head = {key: math.log1p(shift.get(key, 0.0)) + random.gauss(0, 0.002) for key in some}
        return Pair(head, {key: random.gauss(0, 0.002) for key in some}, dict.fromkeys(some, 0.002), {})

    found.pairs = [("screen", pair(keys)) for _ in range(rules.screen_pairs)]
    suspects = found.suspects(rules)
    found.pairs += [("confirm", pair(suspects)) for _ in range(rules.confirm_pairs if suspects else 0)]
    return found


def part_of(found: Evidence, keys: Sequence[str], node: str) -> Evidence:
    """What a task with `keys` alone would have left, had it measured the same."""

    def of(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in keys}

    pairs = [(phase, Pair(of(p.head), of(p.floor), of(p.seconds), of(p.blocks))) for phase, p in found.pairs]
    exact = {arm: of(rows) for arm, rows in found.exact.items()}
    return replace(found, keys=list(keys), exact=exact, pairs=pairs, node=node)


@given(st.data())
@settings(max_examples=20)
def test_cases_spread_over_tasks_get_the_verdicts_that_one_machine_gives(data: st.DataObject) -> None:
    keys = [point.key for point in POINTS]
    slow = data.draw(st.dictionaries(st.sampled_from(keys), st.sampled_from([-0.1, 0.03, 0.2])))
    whole = played(keys, slow)
    owner = {key: data.draw(st.integers(0, 2)) for key in keys}
    parts = {n: part_of(whole, [key for key in keys if owner[key] == n], f"n{n}") for n in set(owner.values())}
    alone, spread = decide(ARMS, {0: whole}, RULES, 1.0), decide(ARMS, parts, RULES, 1.0)
    assert {case.key: case for case in spread.cases} == {case.key: case for case in alone.cases}
    assert (spread.verdict, spread.contaminated) == (alone.verdict, alone.contaminated)
    assert spread.nodes == {key: f"n{owner[key]}" for key in keys}


def test_the_level_is_shared_by_the_suspects_of_all_tasks() -> None:
    rules = Rules(
        screen_pairs=1, confirm_pairs=7
    )  # seven pairs all slower: p = 1/128, less than 1 % and more than half
    keys = [point.key for point in POINTS[:2]]
    parts = {n: played([key], {key: 0.5}, rules) for n, key in enumerate(keys)}
    assert [decide(ARMS, {0: part}, rules, 1.0).verdict for part in parts.values()] == ["REGRESSION", "REGRESSION"]
    both = decide(ARMS, parts, rules, 1.0)
    assert "REGRESSION" not in {case.verdict for case in both.cases}
    assert both.exit_status == 3


@pytest.mark.parametrize(("lost", "verdict"), [(False, "PASS"), (True, "INCONCLUSIVE")])
def test_tasks_that_find_the_same_files_pass_untimed_unless_one_is_lost(lost: bool, verdict: str) -> None:
    keys = [point.key for point in POINTS]
    shards = enumerate((keys[:3], keys[3:5]))
    parts = {number: replace(played(shard, {}), pairs=[], unchanged=True) for number, shard in shards}
    result = decide(ARMS, parts, RULES, 1.0, {keys[5]: "task 2 ended without a result"} if lost else {})
    assert (result.verdict, result.unchanged, result.pairs) == (verdict, True, [])


@pytest.mark.parametrize("unchanged", [False, True])
def test_evidence_reads_back_as_it_was_written(unchanged: bool) -> None:
    found = replace(played([point.key for point in POINTS], {POINTS[0].key: 0.2}), unchanged=unchanged)
    assert Evidence.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: int | None = 3, budget_s: float = 600.0) -> Plan:
    monkeypatch.setattr(gate_slurm, "_ops", lambda arms, impls, timeout_s: dict.fromkeys(impls, "local_attention"))
    return prepare(folder, ARMS, POINTS, RULES, Options(tasks=tasks), budget_s, 10.0)


@pytest.mark.parametrize("tasks", [1, 2, 4, 50, None])
def test_every_case_is_in_one_task_and_the_plan_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: int | None
) -> None:
    plan = planned(tmp_path, monkeypatch, tasks)
    assert load(tmp_path / "tasks") == plan
    assert sorted(point.key for shard in plan.shards for point in shard) == sorted(point.key for point in POINTS)
    assert all(plan.shards)
    assert len(plan.shards) == min(tasks or 1, len(POINTS))


def test_a_short_budget_makes_more_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(planned(tmp_path, monkeypatch, None, budget_s=20.0).shards) > 1


def test_an_array_that_slurm_would_end_before_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="give more time or less budget"):
        require_room(tmp_path, Options(minutes=10), 600.0)
    require_room(tmp_path, Options(minutes=11), 600.0)


def test_a_folder_with_the_tasks_of_another_gate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    with pytest.raises(SlurmError, match="give another --out"):
        require_room(tmp_path, Options(), 600.0)


class Cluster:
    """Plays Slurm: a task runs at the next question, or dies as often as `deaths` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deaths: dict[int, int] = {}
        self.shift: dict[str, float] = {}
        self.digests: list[str] = []
        self.queued: dict[str, int] = {}
        self.submissions: list[list[int]] = []
        self.cancelled: list[str] = []
        self.work: Callable[[int], None] = Task(Path())
        self.clock = 0.0
        monkeypatch.setattr(through, "queue", self.queue)
        monkeypatch.setattr(through, "submit", self.submit)
        monkeypatch.setattr(through.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(through.time, "sleep", self.sleep)
        for module in (through, gate_slurm):
            monkeypatch.setattr(module, "require_slurm", lambda: None, raising=False)
        monkeypatch.setattr(gate_slurm, "cancel", self.cancelled.append)
        monkeypatch.setattr(gate.Gate, "measure", lambda gate: self.measure(gate.points, gate.rules))
        monkeypatch.setattr(gate_slurm.platform, "node", lambda: f"node{len(self.submissions)}")

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    def queue(self, name: str) -> dict[str, tuple[str, str]]:
        for index in self.queued.values():
            self.deaths[index] = self.deaths.get(index, 0) - 1
            if self.deaths[index] < 0:
                self.work(index)
        self.queued.clear()
        return {}

    def submit(
        self, folder: Path, name: str, work: Callable[[int], None], indexes: list[int], options: Options
    ) -> dict[str, int]:
        self.work = work
        self.submissions.append(list(indexes))
        new = {f"{len(self.submissions)}_{place}": index for place, index in enumerate(indexes)}
        self.queued |= new
        return new

    def measure(self, points: Sequence[Point], rules: Rules) -> Evidence:
        found = played([point.key for point in points], self.shift, rules)
        if self.digests:
            found.loaded = found.loaded | {"head": LOADED["head"] | {"digest": self.digests.pop()}}
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def gated(plan: Plan) -> Result:
    return gate_slurm.run(plan, Options(), lambda now: None)


def test_identical_arms_pass(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = gated(planned(tmp_path, monkeypatch))
    assert (result.verdict, result.exit_status) == ("PASS", 0)
    assert cluster.submissions == [[0, 1, 2]]
    assert cluster.cancelled == []


def test_a_slow_down_in_any_task_fails_the_run_and_all_reports_name_the_node(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = random.choice(POINTS).key
    cluster.shift = {slow: 0.2}
    result = gated(planned(tmp_path, monkeypatch))
    assert (result.verdict, result.exit_status) == ("REGRESSION", 2)
    assert [case.key for case in result.cases if case.verdict == "REGRESSION"] == [slow]
    for path in gate_report.write_all(result, tmp_path):
        assert "node1" in path.read_text(), path
    values = json.loads((tmp_path / "gate.json").read_text())
    assert sorted(key for share in values["shares"] for key in share["keys"]) == sorted(p.key for p in POINTS)


def test_a_task_that_dies_is_started_again(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.deaths = {1: 2}
    result = gated(planned(tmp_path, monkeypatch))
    assert result.exit_status == 0
    assert cluster.submissions == [[0, 1, 2], [1], [1]]
    assert {share.task: share.node for share in result.shares} == {0: "node1", 1: "node3", 2: "node1"}


@pytest.mark.parametrize(("slow", "status"), [(False, 3), (True, 2)])
def test_cases_of_a_task_that_is_given_up_are_inconclusive_and_never_pass(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool, status: int
) -> None:
    plan = planned(tmp_path, monkeypatch)
    cluster.deaths = {0: 99}
    cluster.shift = {plan.shards[1][0].key: 0.2 if slow else 0.0}
    result = gated(plan)
    assert result.exit_status == status
    lost = {case.key for case in result.cases if case.verdict == "INCONCLUSIVE"}
    assert lost == {point.key for point in plan.shards[0]}
    assert all("task 0 ended 3 times" in case.reason for case in result.cases if case.key in lost)


def test_a_cluster_on_which_everything_dies_is_inconclusive(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.deaths = dict.fromkeys(range(3), 99)
    result = gated(planned(tmp_path, monkeypatch))
    assert result.exit_status == 3
    assert len(gate_report.write_all(result, tmp_path)) == 5


def test_an_arm_that_differs_from_node_to_node_is_refused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.digests = ["new", "new", "old"]
    with pytest.raises(ArmError, match="the head arm was not the same in all tasks"):
        gated(planned(tmp_path, monkeypatch))


def test_an_interrupted_submitter_cancels_its_job(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, monkeypatch)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            gate_slurm.run(plan, Options(), lambda now: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert cluster.cancelled == [plan.name]


def test_a_task_that_is_started_again_measures_anew_and_a_finished_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, monkeypatch)
    journal = plan.folder / "0000.journal.jsonl"
    journal.write_text("a pair of another node\n")
    seen: list[Point] = []

    def measure(gate: gate.Gate) -> Evidence:
        assert not journal.exists()
        seen.extend(gate.points)
        return played([point.key for point in gate.points], {})

    monkeypatch.setattr(gate.Gate, "measure", measure)
    monkeypatch.setattr(gate_slurm, "available_cores", lambda: 48)
    Task(plan.folder)(0)
    assert plan.missing() == {index: len(plan.shards[index]) for index in (1, 2)}
    assert [point.key for point in seen] == [point.key for point in plan.shards[0]]
    assert {point.case.threads for point in seen} == {48}
    Task(plan.folder)(0)
    assert len(seen) == len(plan.shards[0])


def test_the_cost_of_an_implementation_that_head_lacks_is_unknown_and_one_that_no_arm_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = Path(gate.__file__).parents[1]
    arms = [Arm(name, package.parent, name, sys.executable) for name in ("base", "head", "copy")]
    names = ["unfold", "nothing_like_it"]
    with pytest.raises(ArmError, match="neither arm has 'nothing_like_it'"):
        gate_slurm._ops(arms, names, 120.0)
    monkeypatch.setattr(gate_slurm, "survey", lambda arm, impls, timeout_s: ({}, {}))
    assert gate_slurm._ops(arms, names, 120.0) == {"unfold": "local_attention", "nothing_like_it": ""}
    assert gate_slurm.screen_s(POINTS[0], "", RULES) < gate_slurm.screen_s(
        Point("unfold", Case(batch=64, resolution=56)), "local_attention", RULES
    )


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (0.3, 2)])
def test_the_command_spreads_a_suite_and_ends_with_the_status_of_the_whole(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, status: int
) -> None:
    monkeypatch.setattr(gate_slurm, "_ops", lambda arms, impls, timeout_s: dict.fromkeys(impls, ""))
    monkeypatch.setattr("sasa_bench.gate.arms.set_up", lambda *arguments: ARMS)
    monkeypatch.setattr("sasa_bench.gate.sources.sources", lambda base, head: ())
    cluster.shift = {Point("conv3x3", Case(channels=16)).key: shift}
    suite = tmp_path / "s.toml"
    suite.write_text('title = "?"\nimpls = ["unfold", "conv3x3"]\n[axes]\nchannels = [16, 32]\n')
    out = tmp_path / "out"
    words = ["gate", "--base", "a", "--head", "b", str(suite), "--slurm", "partition=x", "--slurm", "array=2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--out", str(out)])
    assert stop.value.code == status
    assert len(load(out / "tasks").shards) == 2
    assert {path.suffix for path in out.glob("gate.*")} == {".txt", ".md", ".xml", ".json", ".html"}
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.toml", "b.toml"], "unexpected extra argument"),
        (["--slurm", "time=5", "suites/gate.toml"], "give more time or less budget"),
        (["suites/gate.toml", "-c", "threads=1,2"], "sweeps threads"),
    ],
)
def test_bad_words_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sasa_bench").mkdir(parents=True)
        (tmp_path / name / "sasa_bench/__init__.py").touch()
    arms = ["--base", str(tmp_path / "a"), "--head", str(tmp_path / "b")]
    command = ["gate", *arms, "--out", str(tmp_path / "o"), *words]
    found = CliRunner().invoke(cli.cli, command)
    assert said in found.output + str(found.exception)
