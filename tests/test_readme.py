"""What the README says is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sasa_bench import impls, suite
from sasa_bench.cli import starter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_table_of_implementations_is_the_generated_one() -> None:
    table = README.split("prints this table -->\n")[1].split("<!-- end of implementations")[0]
    lines = []
    for name in impls.names():
        impl = impls.get(name)
        mark, how = (" †", f" († {impl.info.differs})") if impl.info.differs else ("", "")
        lines.append(f"| `{name}`{mark} | {impl.op.name.replace('_', ' ')} | {impl.summary}{how} |")
    assert table.strip().splitlines()[2:] == lines


def test_the_suite_it_shows_is_a_suite() -> None:
    (text,) = code_blocks("toml")
    assert suite.from_data("shown", tomllib.loads(text)).size == 12


def test_the_implementation_it_shows_is_an_implementation(tmp_path: Path) -> None:
    (text,) = code_blocks("python")
    path = tmp_path / "my_kernel.py"
    path.write_text(text)
    assert impls.get(str(path)).name == "my_kernel"


def test_the_script_it_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = code_blocks("py")
    monkeypatch.chdir(tmp_path)
    starter.write(Path("my_kernel.py"))
    exec(text, {})
    *table, seconds = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in table[1:]] == [["my_kernel", "ok"], ["conv3x3", "ok"]]
    assert float(seconds) > 0
