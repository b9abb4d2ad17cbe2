"""Cutting loses and splits nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sasa_bench.case import Case
from sasa_bench.cli import cli
from sasa_bench.results.file import read
from sasa_bench.results.record import ImplInfo
from sasa_bench.suite import Suite, SuiteError, load
from sasa_bench.sweep.shard import cut, expected_s, require_one_meaning_of_threads, spread

IMPLS = {
    "unfold": ImplInfo("unfold", "local_attention", "windows", 2),
    "conv3x3": ImplInfo("conv3x3", "convolution", "a convolution", 4),
    "mine.py": ImplInfo("mine", "an op of my own", "from a file", 9),
}


def suite(name: str, cases: list[Case], impls: tuple[str, ...] = ("unfold", "conv3x3")) -> Suite:
    return Suite(name, "A question?", impls, tuple(dict.fromkeys(cases)), ())


cases = st.builds(
    Case,
    kernel_size=st.sampled_from([1, 3, 7, 19]),
    channels=st.sampled_from([8, 64, 512]),
    resolution=st.sampled_from([1, 7, "6x10", 63]),
    mode=st.sampled_from(["forward", "backward", "training"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
suites = st.lists(st.lists(cases, max_size=12), min_size=1, max_size=3).map(
    lambda many: [suite(f"s{number}", one, tuple(IMPLS)) for number, one in enumerate(many)]
)


@given(suites, st.integers(1, 9))
def test_every_case_is_in_exactly_one_shard_and_keeps_all_its_implementations(whole: list[Suite], count: int) -> None:
    shards = cut(whole, count, (), IMPLS)
    assert len(shards) == count
    found = [(part.name, case) for shard in shards for part in shard for case in part.cases]
    assert sorted(found, key=repr) == sorted(((s.name, case) for s in whole for case in s.cases), key=repr)
    assert all(part.impls == tuple(IMPLS) and part.cases for shard in shards for part in shard)


@given(suites, st.integers(1, 9))
def test_a_cut_depends_on_its_arguments_alone(whole: list[Suite], count: int) -> None:
    assert cut(whole, count, (), IMPLS) == cut(whole, count, (), IMPLS)


@given(st.lists(st.floats(0.1, 1e4), max_size=40), st.integers(1, 8))
def test_groups_are_dealt_whole_in_order_and_balanced(costs: list[float], count: int) -> None:
    groups = list(enumerate(costs))
    tasks = spread(groups, count, lambda group: group[1])
    assert sorted(group for task in tasks for group in task) == groups
    assert all(task == sorted(task) for task in tasks)
    dearest = max(sum(cost for _, cost in task) for task in tasks)
    assert dearest <= sum(costs) / count + max(costs, default=0) + 1e-6


def test_a_larger_case_is_expected_to_take_longer() -> None:
    small, large = (expected_s(Case(resolution=side), ["local_attention"] * 2) for side in (7, 112))
    assert 0 < small < large
    assert expected_s(Case(), []) == 0
    assert expected_s(Case(), ["an op without a formula"]) > 0


def test_every_core_next_to_a_number_of_threads_is_refused_because_it_may_be_the_same_case() -> None:
    require_one_meaning_of_threads([suite("a", [Case(), Case(threads=2, batch=1)]), suite("b", [Case(threads=2)])])
    with pytest.raises(SuiteError, match=r"threads = 0 .* next to threads = 2.*-c threads=1,2,4"):
        require_one_meaning_of_threads([suite("a", [Case(), Case(threads=2)])])


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["run", "suites/smoke.toml", "--shard", text, "--out", str(tmp_path / "x.jsonl")])
    assert said.exit_code
    assert f"--shard {text}: give I/N" in said.output


@pytest.mark.slow
def test_shards_merge_to_the_rows_of_the_suite(tmp_path: Path) -> None:
    held = ["-c", "mode=forward", "-c", "threads=1", "--impl", "unfold", "--impl", "conv3x3", "--budget", "0.01"]
    files = [str(tmp_path / f"{number}.jsonl") for number in (1, 2)]
    for number, out in enumerate(files, 1):
        said = CliRunner().invoke(cli, ["run", "suites/smoke.toml", *held, "--shard", f"{number}/2", "--out", out])
        assert said.exit_code == 0, said.output
    together = tmp_path / "together.jsonl"
    assert CliRunner().invoke(cli, ["merge", *files, "--out", str(together)]).exit_code == 0
    rows = read([together]).rows
    cases = load(Path("suites/smoke.toml"), {"mode": ["forward"], "threads": [1]}).cases
    assert sorted((row.key for row in rows), key=repr) == sorted(
        (("smoke", impl, case) for impl in ("unfold", "conv3x3") for case in cases), key=repr
    )
    assert {row.status for row in rows} == {"ok"}
    assert len(rows) == 4
    assert json.loads(together.read_text().splitlines()[0])["kind"] == "machine"
