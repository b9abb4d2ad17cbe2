"""What docs/tutorial.md shows works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from sasa_bench import cli
from sasa_bench.results.file import read

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
ONE_THREAD = ("-c", "threads=1")
QUICK = {"run": ("--budget", "0.02", *ONE_THREAD), "profile": ONE_THREAD}
OFFLINE = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", "site")


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(language, content) of the code blocks, in their order."""
    return [found for found in re.findall(r"```(\w+)\n(.*?)```", TUTORIAL, re.DOTALL) if found[0] in languages]


def perform(command: str) -> None:
    """Run one line of the tutorial in the current folder."""
    program, *arguments = shlex.split(command)
    if program == "sasa-bench":
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *QUICK.get(arguments[0], ())])
        assert not stop.value.code, command
    elif program == "pip":
        subprocess.run([sys.executable, "-m", "pip", *arguments, *OFFLINE], check=True)
    else:
        subprocess.run(command, shell=True, check=True)


def replace_function(path: Path, code: str) -> None:
    """Put the function that `code` defines in the place of the one of that name."""
    match = re.match(r"def \w+", code)
    assert match
    text, count = re.subn(
        rf"^{match[0]}\(.*?\n(?=\n\n)", lambda _: code, path.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    assert count == 1
    path.write_text(text)


@pytest.mark.slow
def test_its_commands_work_from_an_empty_file_to_an_installed_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "site")]))
    for language, content in blocks("sh", "python", "toml"):
        if language == "python":
            replace_function(Path("my_kernel.py"), content)
        elif language == "toml":
            Path("my-kernels", "pyproject.toml").write_text(content)
        else:
            for command in content.splitlines():
                perform(command)

    shown = capsys.readouterr().out
    first = read([Path("kernel.jsonl")]).rows
    assert {row.impl for row in first} == {"my_kernel", "unfold", "conv3x3"}
    assert {row.status for row in first} == {"ok"}
    broken = read([Path("broken.jsonl")]).rows
    assert {(row.status, row.samples_s) for row in broken} == {("wrong", ())}
    assert "times its budget" in shown
    window = read([Path("window.jsonl")]).rows
    assert {row.status for row in window} == {"ok"}
    assert "my_kernel" in Path("window.html").read_text()
    assert Path("profile", "index.html").exists()
    packaged = [row for row in read([Path("packaged.jsonl")]).rows if row.impl == "my_kernel"]
    assert {(row.case.mode, row.status, row.reason) for row in packaged} == {
        ("forward", "ok", ""),
        ("training", "skipped", "this kernel has no backward pass"),
    }
    assert len(json.loads(Path("bench.json").read_text())) == len(json.loads(Path("bencher.json").read_text())) == 6


def test_its_ci_job_is_valid_and_calls_the_gate_with_options_that_exist(tmp_path: Path) -> None:
    ((_, text),) = blocks("yaml")
    job = yaml.safe_load(text)["jobs"]["gate"]
    commands = "\n".join(step["run"] for step in job["steps"] if "run" in step)
    (line,) = re.findall(r"sasa-bench (gate .*)", commands)
    arguments = shlex.split(line)
    shown = CliRunner().invoke(cli.cli, ["gate", "--help"]).output
    options = [word for word in arguments if word.startswith("--")]
    assert {"--base", "--merge-base", "--head", "--impl"} <= set(options)
    for option in options:
        assert option in shown, option
    parsed = cli.cli.commands["gate"].make_context("gate", arguments[1:])
    assert (parsed.params["suite"], parsed.params["impls"]) == (Path("gate"), ("my_kernel.py",))
    ((_, packaging),) = blocks("toml")
    assert list(tomllib.loads(packaging)["project"]["entry-points"]["sasa_bench.impls"]) == ["my_kernel"]
    for step in job["steps"]:
        if "run" in step:
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
