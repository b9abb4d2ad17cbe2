"""Implementations from files and other packages: siblings, digests, names, and what cannot be loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sasa_bench import impls
from sasa_bench.impls import registry
from sasa_bench.sweep.run import describe
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing.process import WorkerRefused

KERNEL = """from dataclasses import replace
from sasa_bench.impls import get
{}IMPL = replace(get("naive"), name={!r}{})
"""


def kernel(folder: Path, name: object = "mine", extra: str = "", fields: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "k.py"
    path.write_text(KERNEL.format(extra, name, fields))
    return path


def test_each_file_sees_its_own_siblings(tmp_path: Path) -> None:
    paths = []
    for version in ("one", "two"):
        folder = tmp_path / version
        paths.append(kernel(folder, extra="import helper_of_mine\n", fields=", summary=helper_of_mine.WORDS"))
        (folder / "helper_of_mine.py").write_text(f"WORDS = {version!r}\n")
    assert [impls.get(str(path)).summary for path in paths] == ["one", "two"]
    assert str(tmp_path) not in " ".join(sys.path)


def test_the_digest_covers_the_file_its_siblings_and_the_sources_beside_it(tmp_path: Path) -> None:
    path = kernel(tmp_path, extra="import helper_of_mine\n")
    helper, source, other = (tmp_path / name for name in ("helper_of_mine.py", "k.cu", "notes.txt"))
    for file in (helper, source, other):
        file.write_text("")
    seen = []
    for file in (None, other, helper, source, path):
        if file is not None:
            file.write_text(file.read_text() + "# more\n")
        impls.get(str(path))
        seen.append(impls.source(str(path))["digest"])
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4
    assert impls.source("unfold") == {}


def test_a_file_in_a_repository_has_a_commit_and_one_that_git_does_not_track_has_none(tmp_path: Path) -> None:
    path = kernel(tmp_path)
    impls.get(str(path))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert "commit" not in impls.source(str(path))
    subprocess.run([*git, "add", "k.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "kernel"], check=True)
    clean = impls.source(str(path))["commit"]
    assert len(clean) == 12
    path.write_text(path.read_text() + "\n")
    assert impls.source(str(path))["commit"] == f"{clean}+dirty"


def test_a_file_named_like_one_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(impls.UnknownImplError, match="its IMPL is called 'unfold', which is already registered"):
        impls.get(str(kernel(tmp_path, "unfold")))


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    faults = {
        "import sys; sys.exit(0)\n": "SystemExit: 0 (line 3)",
        "1 / 0\n": "ZeroDivisionError: division by zero (line 3)",
        "(\n": "SyntaxError",
        "import os; os._exit(0)\n": "the worker ended with exit status 0",
    }
    with Workers(60.0) as workers:
        for number, (line, said) in enumerate(faults.items()):
            path = kernel(tmp_path / str(number), extra=line)
            with pytest.raises(WorkerRefused) as refused:
                describe(workers, ["naive", str(path)])
            assert f"{path} cannot be loaded: {said}" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("", "", "is called '': give one word"),
        ("a b=c", "", "is called 'a b=c': give one word"),
        (3, "", "is called 3: give one word"),
        ("mine", ", summary=None", "summary of its IMPL is None: give str"),
        ("mine", ", op='local_attention'", "op of its IMPL is 'local_attention': give Op"),
    ],
)
def test_an_impl_that_no_file_could_hold_is_refused(tmp_path: Path, name: object, fields: str, said: str) -> None:
    path = kernel(tmp_path, name, fields=fields)
    with pytest.raises(registry.UnknownImplError, match=re.escape(said)):
        registry.get(str(path))


PLUGINS = {"gone": "no_such_module_of_mine:IMPL", "leaves": "leaves_of_mine:IMPL", "unfold": "leaves_of_mine:IMPL"}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "leaves_of_mine.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in PLUGINS.items()]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: entries)


@pytest.mark.usefixtures("plugins")
def test_broken_plugins_are_lines_and_the_others_work() -> None:
    from sasa_bench.timing.child import _describe

    lines = {info["name"]: info["missing"] for info in _describe()}
    assert "gone = no_such_module_of_mine:IMPL cannot be loaded: ModuleNotFoundError" in lines["gone"]
    assert "leaves = leaves_of_mine:IMPL cannot be loaded: SystemExit: 3" in lines["leaves"]
    assert "'unfold' is built in" in lines["unfold (leaves_of_mine:IMPL)"]
    assert lines["unfold"] is None
    assert set(lines) >= set(impls.names())
    with pytest.raises(impls.UnknownImplError, match="cannot be loaded"):
        _describe(["gone"])
