"""The commands of a page, run in their order: workers, arms and Slurm are played, all else is real.

The tutorial has a test of its own, where nothing is played. Verbs that look at the machine have theirs.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import factory
import played
import pytest
from pages import called_in_blocks

from sasa_bench import cli

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("start", "report", "gate", "slurm", "layer", "peers"))]
ELSEWHERE = ("profile", "doctor", "list")
SUITES = ("smoke", "kernel_size", "gate", "peers")
"""Those that `suites/*.toml` names here."""


def commands(page: str) -> list[list[str]]:
    """The words of every line of a code block that calls sasa-bench."""
    return [shlex.split(line, comments=True)[1:] for line in called_in_blocks((ROOT / page).read_text())]


def on_every_machine(words: list[str]) -> list[list[str]]:
    """The command, or all four of which a page shows the first part."""
    if "1/4" not in words:
        return [words]
    return [[re.sub(r"^1(?=/4$|\.jsonl$)", str(number), word) for word in words] for number in range(1, 5)]


def files_of_the_reader(folder: Path) -> None:
    """What the pages call files of yours."""
    (folder / "suites").mkdir()
    for name in SUITES:
        shutil.copy(ROOT / f"suites/{name}.toml", folder / "suites")
    rows = [
        replace(row, suite="training", impl={"blocked": "fused"}.get(row.impl, row.impl)) for row in factory.sweep()
    ]
    (folder / "results").mkdir()
    for path in ("a.jsonl", "b.jsonl", "results/a.jsonl"):
        factory.results_file(folder / path, rows)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_their_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played.play(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    files_of_the_reader(tmp_path)
    ran = [words for words in commands(page) if words[0] not in ELSEWHERE]
    assert ran
    for words in ran:
        for given in on_every_machine(words):
            with pytest.raises(SystemExit) as stop:
                cli.main([word for each in given for word in (sorted(glob.glob(each)) if "*.toml" in each else [each])])
            assert not stop.value.code, (given, capsys.readouterr().err)
            if "--out" in given:
                assert Path(given[given.index("--out") + 1]).exists(), given
