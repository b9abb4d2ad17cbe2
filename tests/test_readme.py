"""What the README and the pages of the documentation show in Python and TOML is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import sasa_bench
from sasa_bench import impls, suite
from sasa_bench.cli import starter

ROOT = Path(__file__).parent.parent


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_suite_that_the_page_of_suites_shows_is_a_suite() -> None:
    (text,) = code_blocks("docs/suites.md", "toml")
    assert suite.from_data("shown", tomllib.loads(text)).size == 36


def test_the_kernel_that_the_page_of_implementations_shows_is_an_implementation(tmp_path: Path) -> None:
    (text,) = code_blocks("docs/implementations.md", "python")
    path = tmp_path / "my_kernel.py"
    path.write_text(text)
    assert impls.get(str(path)).name == "my_kernel"


def test_the_script_that_the_page_of_the_library_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = code_blocks("docs/library.md", "python")
    monkeypatch.chdir(tmp_path)
    starter.write(Path("my_kernel.py"))
    exec(text, {})
    *table, seconds = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in table[1:]] == [["my_kernel", "ok"], ["conv3x3", "ok"]]
    assert float(seconds) > 0


def test_the_training_loop_that_the_page_of_the_layer_shows_learns() -> None:
    _, training = code_blocks("docs/layer.md", "python")
    names: dict[str, Any] = {"torch": torch, "sasa_bench": sasa_bench}
    exec(training, names)
    first = names["nn"].functional.cross_entropy(torch.zeros(64, 2), names["labels"])
    assert float(names["loss"]) < float(first)
    assert {p.grad.dtype for p in names["small"].parameters()} == {torch.float32}


def test_the_layer_that_the_readme_shows_runs() -> None:
    (text,) = code_blocks("README.md", "py")
    names: dict[str, object] = {}
    exec(text, names)
    assert getattr(names["y"], "shape", None) == (2, 64, 28, 28)
