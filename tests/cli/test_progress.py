"""How far a verb is: lines where there is no terminal, a bar where there is one, nothing before there is news."""

from __future__ import annotations

import pytest

from sasa_bench.cli import progress as module
from sasa_bench.cli.progress import Shown, progress


def test_without_a_terminal_a_line_stands_for_each_phase_and_for_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress() as shown:
        for done in range(41):
            now[0] += 2.0
            shown.show(done, 40, "smoke" if done < 20 else "channels", f"kernel_size={done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0 of 40: smoke: kernel_size=0"
    assert "20 of 40: channels: kernel_size=20" in lines
    assert lines[-1] == "40 of 40: channels: kernel_size=40"
    assert len(lines) == 5


def test_nothing_is_printed_before_there_is_anything_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        Shown(terminal).stop()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown(terminal=True)
    shown.show(3, 4, "smoke", "[bold]batch=2")
    shown.stop()
    said = capsys.readouterr().err
    assert "3/4" in said
    assert "smoke [bold]batch=2" in said


def test_all_rows_are_said_to_be_there_once_and_then_what_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as shown:
        for done, phase in ((3, "smoke"), (4, "smoke"), (4, "again"), (4, "again")):
            shown.show(done, 4, phase)
    assert capsys.readouterr().err.splitlines() == ["3 of 4: smoke", "4 of 4: smoke", "4 of 4: again"]
