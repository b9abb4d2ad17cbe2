"""Pairs of measurements and exact figures of live arms, each a process of its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkouts import POINTS, SIZES, TINY, checkout, substitute

from sasa_bench.gate.arms import Arm, set_up
from sasa_bench.gate.pairs import BLOCKS, MOST_BLOCKS, Counts, Point, _blocks, exact_rows, measure_pair, start
from sasa_bench.gate.verdicts import INCONCLUSIVE, LATE, Rules, exact_verdict


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Arm]:
    folder = tmp_path_factory.mktemp("arms")
    edited = substitute("impls/unfold.py", SIZES, f"    import time\n\n    time.perf_counter()\n{SIZES}")
    return set_up(str(checkout(folder / "b")), str(checkout(folder / "h", edited)), folder / "out")


def test_live_arms_take_turns(arms: list[Arm]) -> None:
    counts = Counts()
    pair = measure_pair(arms, POINTS, counts, 60.0, blocks=3)
    assert set(pair.head) == set(pair.floor) == {p.key for p in POINTS}
    assert all(abs(value) < math.log(10) for value in [*pair.head.values(), *pair.floor.values()])
    assert all(count >= 1 for count in counts.calls.values())
    slowed = POINTS[0].key
    again = measure_pair(
        arms, POINTS[:1], counts, 60.0, blocks=3, spin=lambda counts: {slowed: 99 * counts.seconds[slowed]}
    )
    assert again.head[slowed] > math.log(4)


def test_threads_of_an_arm_that_waits_leave_the_cores_to_the_others(arms: list[Arm]) -> None:
    point = Point("conv3x3", TINY.with_(channels=64, resolution=28, threads=2))
    worker = start(arms[0], 60.0)

    def busy_s() -> float:
        files = Path(f"/proc/{worker.process.pid}/task").glob("*/schedstat")
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9

    try:
        worker.ask("prepare_cases", cases={point.key: [point.impl, point.case.to_dict()]}, seed=1, exact=False)
        assert busy_s() > 0, "the system shows no time of threads"
        waited = []
        for _ in range(9):
            worker.ask("block", key=point.key, count=3, spin_s=0.0)
            before = busy_s()
            time.sleep(0.02)
            waited.append(busy_s() - before)
        assert min(waited) < 1e-3
    finally:
        worker.close()


def test_exact_figures_of_live_arms_repeat_exactly(arms: list[Arm]) -> None:
    first, second = exact_rows([arms[0], arms[2]], POINTS, 60.0).values()
    for key, row in first.items():
        assert row["status"] == "ok"
        for name in ("flops", "params", "operator_count", "allocated_bytes", "err_budget"):
            assert row[name] == second[key][name], (key, name)
        assert row["operator_count"] > 0
        assert row["allocated_bytes"] > 0


@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (substitute("impls/unfold.py", "return (weights", "return 1.01 * (weights"), "wrong"),
        (
            substitute("impls/unfold.py", SIZES, f"    import os\n\n    os.kill(os.getpid(), 9)\n{SIZES}"),
            "error",
        ),
        (substitute("impls/unfold.py", "IMPL = ", "NOTHING = "), "error"),
    ],
    ids=["wrong", "killed", "gone"],
)
def test_a_head_that_broke_is_seen_in_its_exact_figures(
    tmp_path: Path, edit: Callable[[Path], None], status: str
) -> None:
    head = Arm("head", checkout(tmp_path / "h", edit), "h", sys.executable)
    rows = exact_rows([head], [POINTS[0], POINTS[2]], 60.0)["head"]
    assert rows[POINTS[0].key]["status"] == status
    assert rows[POINTS[2].key]["status"] == "ok"


def test_a_case_that_died_in_one_arm_alone_is_tried_again_there(tmp_path: Path) -> None:
    mark = tmp_path / "died"
    dies = f"    import os\n    import pathlib\n\n    mark = pathlib.Path({str(mark)!r})\n"
    dies += "    if not mark.exists():\n        mark.touch()\n        os.kill(os.getpid(), 9)\n"
    edit = substitute("impls/unfold.py", SIZES, dies + SIZES)
    arms = set_up(str(checkout(tmp_path / "b")), str(checkout(tmp_path / "h", edit)), tmp_path / "out")
    rows = exact_rows(arms[:2], POINTS[:2], 60.0)
    assert mark.exists()
    assert {row["status"] for arm in rows.values() for row in arm.values()} == {"ok"}


def test_no_case_starts_after_the_budget(arms: list[Arm]) -> None:
    rows = exact_rows(arms[:2], POINTS, 60.0, until=time.monotonic() - 1)
    assert {row["status"] for of_arm in rows.values() for row in of_arm.values()} == {LATE}
    assert exact_verdict("a", rows["base"][POINTS[0].key], rows["head"][POINTS[0].key], Rules()).verdict == INCONCLUSIVE


def test_a_case_that_failed_when_the_budget_had_ended_keeps_its_reason(
    arms: list[Arm], monkeypatch: pytest.MonkeyPatch
) -> None:
    until = time.monotonic() + 1000.0
    asked: list[int] = []

    def once(arms: list[Arm], points: list[Point], *rest: object) -> dict[str, dict[str, dict[str, str]]]:
        asked.append(len(points))
        monkeypatch.setattr(time, "monotonic", lambda: until + 1)
        rows = {"base": {"status": "ok"}, "head": {"status": "timeout", "reason": "it hung"}}
        return {arm.name: {point.key: rows[arm.name] for point in points} for arm in arms}

    monkeypatch.setattr("sasa_bench.gate.pairs._exact_rows", once)
    rows = exact_rows(arms[:2], POINTS[:1], 60.0, until=until)
    assert rows["head"][POINTS[0].key]["reason"] == "it hung"
    assert asked == [1]


def test_calls_longer_than_a_block_get_fewer_blocks() -> None:
    assert _blocks([0.001], 3) == MOST_BLOCKS
    assert _blocks([0.001] * 54, 3) == _blocks([0.4], 3) == BLOCKS
    assert BLOCKS < _blocks([0.05], 3) < MOST_BLOCKS


def test_each_arm_builds_extensions_of_torch_for_itself(arms: list[Arm]) -> None:
    found = {}
    for arm in arms:
        worker = start(arm, 60.0)
        try:
            worker.ask("loaded")  # a process that has just started still shows no environment
            environment = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
        finally:
            worker.close()
        (found[arm.name],) = [value for value in environment if value.startswith(b"TORCH_EXTENSIONS_DIR=")]
    assert found["base"] == found["copy"] != found["head"]


def test_a_head_whose_own_clock_shows_half_the_time_is_timed_by_the_clock_of_the_gate(tmp_path: Path) -> None:
    def halve(package: Path) -> None:
        path = package / "timing/blocks.py"
        path.write_text(path.read_text() + "\n\nREQUESTS['block'] = lambda key, count, spin_s: 1e-9\n")

    arms = set_up(str(checkout(tmp_path / "b")), str(checkout(tmp_path / "h", halve)), tmp_path / "out")
    pair = measure_pair(arms, POINTS[:1], Counts(), 60.0, blocks=5)
    assert abs(pair.head[POINTS[0].key]) < math.log(3)
    assert pair.seconds[POINTS[0].key] > 1e-6
