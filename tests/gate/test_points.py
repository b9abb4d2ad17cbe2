"""Which cases a gate compares: those of both revisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sasa_bench.gate.points import points
from sasa_bench.gate.sources import resolve
from sasa_bench.suite import SuiteError

SUITE = 'title = "t"\nimpls = ["unfold", "blocked"]\n[axes]\nkernel_size = {sizes}\n[fixed]\nthreads = 1\n'


def checkout(folder: Path, sizes: list[int], name: str = "gate") -> Path:
    (folder / "sasa_bench").mkdir(parents=True)
    (folder / "sasa_bench/__init__.py").touch()
    (folder / "suites").mkdir()
    (folder / f"suites/{name}.toml").write_text(SUITE.format(sizes=sizes))
    return folder


def sizes_of(found: list[object]) -> list[int]:
    return sorted({point.case.kernel_size for point in found})  # type: ignore[attr-defined]


@pytest.mark.parametrize("suite", ["suites/gate.toml", "gate"])
def test_a_case_that_head_dropped_is_compared_too(tmp_path: Path, suite: str) -> None:
    both = [resolve(str(checkout(tmp_path / name, sizes))) for name, sizes in (("b", [3, 5]), ("h", [5, 7]))]
    found = points(Path(suite), both)
    assert sizes_of(found) == [3, 5, 7]  # type: ignore[arg-type]
    assert len(found) == len({point.key for point in found}) == 6


def test_a_shipped_suite_is_that_of_each_side_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [resolve(str(checkout(tmp_path / name, sizes))) for name, sizes in (("b", [3]), ("h", [5]))]
    monkeypatch.chdir(tmp_path / "h/sasa_bench")
    assert sizes_of(points(Path("gate"), both)) == [3, 5]  # type: ignore[arg-type]
    assert sizes_of(points(Path("../suites/gate.toml"), both)) == [3, 5]  # type: ignore[arg-type]


def test_a_suite_that_neither_side_holds_is_read_where_it_lies(tmp_path: Path) -> None:
    both = [resolve(str(checkout(tmp_path / name, [3]))) for name in ("b", "h")]
    own = tmp_path / "own.toml"
    own.write_text(SUITE.format(sizes=[9]))
    assert sizes_of(points(own, both, impls=["kern.py"])) == [9]  # type: ignore[arg-type]
    assert {point.impl for point in points(own, both, impls=["kern.py", "kern.py"])} == {"kern.py"}


def test_an_axis_can_be_held_for_both_sides(tmp_path: Path) -> None:
    both = [resolve(str(checkout(tmp_path / name, sizes))) for name, sizes in (("b", [3]), ("h", [5]))]
    assert sizes_of(points(Path("gate"), both, overrides={"kernel_size": [11]})) == [11]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"), [("title =", "does not parse"), ('title = "t"\nimpls = ["a"]\n[axes]\nnope = [1]\n', "nope")]
)
def test_a_suite_of_one_side_that_cannot_be_read_is_named(tmp_path: Path, text: str, words: str) -> None:
    base, head = checkout(tmp_path / "b", [3]), checkout(tmp_path / "h", [3])
    (base / "suites/gate.toml").write_text(text)
    with pytest.raises(SuiteError, match=words) as raised:
        points(Path("gate"), [resolve(str(base)), resolve(str(head))])
    assert str(base) in str(raised.value)


def test_a_suite_that_sweeps_threads_is_refused(tmp_path: Path) -> None:
    both = [resolve(str(checkout(tmp_path / name, [3]))) for name in ("b", "h")]
    with pytest.raises(SuiteError, match="sweeps threads"):
        points(Path("gate"), both, overrides={"threads": [1, 2]})
