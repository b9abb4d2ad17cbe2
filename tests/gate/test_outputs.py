"""Names and comments of a gate: short enough to read, and never ambiguous."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasa_bench.case import Case
from sasa_bench.gate.decision import Result
from sasa_bench.gate.names import shared_axes, short_names, split
from sasa_bench.gate.outputs import MOST_ROWS, junit, markdown, run_link, text
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.verdicts import CaseVerdict, Rules

CASES = st.builds(
    Case,
    kernel_size=st.sampled_from([3, 5, 7]),
    channels=st.sampled_from([16, 128]),
    mode=st.sampled_from(["forward", "training"]),
)


@given(st.lists(st.builds(Point, st.sampled_from(["unfold", "fused"]), CASES), min_size=1, max_size=12, unique=True))
def test_short_names_stay_unique_and_hold_only_what_differs(points: list[Point]) -> None:
    keys = [point.key for point in points]
    names = short_names(keys)
    assert len(set(names.values())) == len(keys)
    for axis in ("kernel_size", "channels", "mode"):
        if len({getattr(point.case, axis) for point in points}) == 1:
            assert not any(f" {axis}=" in name for name in names.values())
        else:
            assert f"{axis}=" not in shared_axes(keys)


@pytest.mark.parametrize("impl", ["unfold", "my kernels/a.py", "k=1/b.py"])
@given(case=CASES)
def test_a_key_is_split_into_implementation_and_axes_whatever_the_path(impl: str, case: Case) -> None:
    found, axes = split(Point(impl, case).key)
    assert found == impl
    plain = Case()
    assert axes == {
        name: str(getattr(case, name))
        for name in ("kernel_size", "channels", "mode")
        if getattr(case, name) != getattr(plain, name)
    }


def test_a_comment_on_a_pull_request_is_short_and_links_to_the_rest() -> None:
    cases = [CaseVerdict(f"unfold batch={n}", "REGRESSION", "slower", ratio=1.2) for n in range(1, 41)]
    result = Result("REGRESSION", cases, {}, "", [], 60.0, Rules())
    said = markdown(result)
    assert said.count("| REGRESSION |") == MOST_ROWS
    assert f"{40 - MOST_ROWS} more are in gate.html" in said


def test_control_characters_and_bars_of_a_reason_stay_in_their_cell() -> None:
    cases = [CaseVerdict("unfold batch=1", "WRONG", "off\x1b[31m by\x1b[0m \x1b[2J| a\nlot\x00")]
    result = Result("REGRESSION", cases, {}, "others\x07 computed", [], 60.0, Rules())
    failure, error = (case[0].attrib["message"] for case in ElementTree.fromstring(junit(result)))
    assert failure == r"WRONG:  off by \x1b[2J| a lot\x00"
    assert error == r"others\x07 computed"
    (row,) = (line for line in markdown(result).splitlines() if "by" in line and line.startswith("|"))
    assert "\x1b" not in markdown(result)
    assert r"by \x1b[2J\| a lot" in row


@pytest.mark.parametrize(("allowed", "kind"), [(False, "error"), (True, "skipped")])
def test_a_case_that_did_not_run_is_no_passed_test(allowed: bool, kind: str) -> None:
    cases = [CaseVerdict("a b=1", "NOT RUN", "absent"), CaseVerdict("a b=2", "SKIPPED", "inference only")]
    suite = ElementTree.fromstring(junit(Result("PASS", cases, {}, "", [], 60.0, Rules(allow_not_run=allowed))))
    assert [case[0].tag for case in suite] == [kind, "skipped"]
    counted = {name: suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")}
    assert counted == {"tests": "2", "failures": "0", "errors": str(int(not allowed)), "skipped": str(1 + allowed)}


def test_the_link_is_that_of_the_workflow_run_and_absent_elsewhere() -> None:
    github = {
        "GITHUB_SERVER_URL": "https://github.example",
        "GITHUB_REPOSITORY": "me/kernels",
        "GITHUB_RUN_ID": "17",
    }
    assert run_link(github) == "https://github.example/me/kernels/actions/runs/17"
    assert run_link({"CI_JOB_URL": "https://gitlab.example/job/3"}) == "https://gitlab.example/job/3"
    assert run_link({}) == ""


def test_arms_that_differ_in_a_kernel_file_alone_are_named_by_it() -> None:
    loaded = {"source": "main", "digest": "0" * 16, "torch": "2", "folder": "/x", "python": "p"}
    digests = {"base": "1a", "head": "2b"}
    arms = {name: loaded | {"kernels": {"kern.py": {"digest": digest}}} for name, digest in digests.items()}
    said = text(Result("PASS", [], arms, "", [], 60.0, Rules()))
    assert "base: main, files around kern.py 1a, torch 2" in said
    assert "head: main, files around kern.py 2b, torch 2" in said


def test_an_arm_says_which_state_of_its_source_it_was_made_from() -> None:
    loaded = {"digest": "0", "torch": "2", "folder": "/x", "python": "p", "commit": "0123456789abcdef"}
    arms = {
        "base": loaded | {"source": "main"},
        "copy": loaded | {"source": loaded["commit"]},
        "head": loaded | {"source": ".", "uncommitted": True},
    }
    said = text(Result("PASS", [], arms, "", [], 60.0, Rules()))
    assert "base: main at 0123456789, files" in said
    assert "copy: 0123456789abcdef, files" in said
    assert "head: . with changes that are in no commit, files" in said


@pytest.mark.parametrize(
    ("verdicts", "allowed", "words"),
    [
        (["INCONCLUSIVE", "EQUIVALENT"], False, "INCONCLUSIVE: 1 case could not be decided"),
        (["INCONCLUSIVE", "NOT RUN", "NOT RUN"], False, "1 case could not be decided and 2 cases ran in neither arm"),
        (["NOT RUN", "NEW"], True, "INCONCLUSIVE: no case was timed"),
    ],
)
def test_an_open_run_says_how_many_cases_are_open_and_why(verdicts: list[str], allowed: bool, words: str) -> None:
    cases = [CaseVerdict(f"a batch={number}", verdict) for number, verdict in enumerate(verdicts)]
    said = text(Result("INCONCLUSIVE", cases, {}, "", [], 60.0, Rules(allow_not_run=allowed)))
    assert words in said.splitlines()[0]
