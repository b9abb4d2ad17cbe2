from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench import impls
from sasa_bench.case import AXES, Case, CaseError
from sasa_bench.suite import KEYS, SuiteError, from_data, load, locate, shipped

SUITES = sorted((Path(__file__).parent.parent / "suites").glob("*.toml"))
GOOD = {"title": "Why?", "impls": ["unfold", "conv3x3"], "axes": {"kernel_size": [3, 5]}, "fixed": {"channels": 64}}


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_every_shipped_suite_loads_and_names_known_implementations(path: Path) -> None:
    suite = load(path)
    assert suite.cases
    assert set(suite.impls) <= set(impls.names())
    assert suite.title[-1] in "?."


def test_shipped_suites_are_found_by_bare_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(shipped()) == [path.stem for path in SUITES]
    assert load(Path("kernel_size")) == load(SUITES[[path.stem for path in SUITES].index("kernel_size")])


def test_a_file_of_ones_own_wins_over_a_shipped_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smoke.toml", "smoke"):
        Path(name).write_text('title = "Mine?"\nimpls = ["unfold"]\n')
        assert load(Path(name)).title == "Mine?"


def test_a_value_of_the_command_line_is_not_blamed_on_the_file_alone() -> None:
    with pytest.raises(SuiteError, match=r"smoke\.toml with -c dtype: dtype = 'bf16': do you mean 'bfloat16'\?"):
        load(Path("smoke"), {"dtype": ["bf16"]})


def test_an_unknown_bare_name_is_answered_with_those_that_exist() -> None:
    with pytest.raises(SuiteError, match=r"kernel_sise: no such suite; do you mean 'kernel_size'\?.*smoke"):
        locate(Path("kernel_sise"))


def test_cases_are_the_product_of_the_axes() -> None:
    data = GOOD | {"axes": {"kernel_size": [3, 5], "channels": [32, 64]}, "fixed": {"heads": 4}}
    cases = from_data("s", data).cases
    assert cases == tuple(Case(kernel_size=k, channels=c, heads=4) for k in (3, 5) for c in (32, 64))


def test_fields_swept_together_are_one_axis() -> None:
    suite = from_data("s", {**GOOD, "axes": {"channels, kernel_size": [[32, 9], [128, 19]]}, "fixed": {}})
    assert [(c.channels, c.kernel_size) for c in suite.cases] == [(32, 9), (128, 19)]
    assert suite.size == 4


def test_an_override_replaces_an_axis_or_a_fixed_value() -> None:
    suite = from_data("s", GOOD, {"kernel_size": [7], "channels": [32, 128]})
    assert [(c.kernel_size, c.channels) for c in suite.cases] == [(7, 32), (7, 128)]


def test_an_override_of_one_of_two_coupled_fields_keeps_the_other() -> None:
    data = {**GOOD, "axes": {"channels, kernel_size": [[32, 9], [128, 19]]}, "fixed": {}}
    suite = from_data("s", data, {"kernel_size": [3]})
    assert [(c.channels, c.kernel_size) for c in suite.cases] == [(32, 3), (128, 3)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, ["colour", *KEYS]),
        ({"title": ""}, ["title"]),
        ({"impls": []}, ["impls"]),
        ({"impls": ["unfold", "unfold"]}, ["twice"]),
        ({"axes": {"window": [3]}}, ["window", *AXES]),
        ({"axes": {"kernel_size": 3}}, ["kernel_size", "list"]),
        ({"axes": {"kernel_size": []}}, ["kernel_size", "at least one"]),
        ({"axes": {"channels, kernel_size": [[32]]}}, ["2 values"]),
        ({"axes": {"channels": [64]}}, ["channels", "twice"]),
        ({"fixed": {"channels": [64]}}, ["channels", "[axes]"]),
        ({"fixed": 3}, ["fixed = 3", "[fixed]"]),
        ({"axes": []}, ["axes = []", "[axes]"]),
        ({"axes": {"position": [{"a": 1}]}}, ["position", "none, absolute, relative"]),
        (
            {"axes": {name: list(range(1, 1002)) for name in ("batch", "resolution")}},
            ["1002001 combinations", "1000000"],
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises((SuiteError, CaseError)) as caught:
        from_data("s", GOOD | change)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [("title = ", "does not parse"), ('title="t"\nimpls=["a"]\n[axes]\nkernel_size=[4]', "even"), (None, "no such")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SuiteError, match=rf"mine\.toml.*{words}"):
        load(path)


def test_a_folder_of_that_name_does_not_hide_a_shipped_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "mine").mkdir()
    assert locate(Path("smoke")) == shipped()["smoke"]
    with pytest.raises(SuiteError, match="mine is a folder"):
        load(Path("mine"))
