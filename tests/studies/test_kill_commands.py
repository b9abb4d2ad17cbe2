"""A small part of the study of commands that are ended: nothing is lost, and the next start gives the same table."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import kill_commands
import kill_counts
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and signals as Linux has them")
def test_commands_that_are_ended_anywhere_lose_nothing(tmp_path: Path) -> None:
    # The study replaces parts of the package, so it has a process of its own.
    seed = random.randrange(1 << 31)
    script = [sys.executable, kill_commands.__file__, "--kills", "1", "--seed", str(seed), "--out"]
    done = subprocess.run([*script, str(tmp_path / "kills.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "kills.csv").read_text().splitlines()) >= 1 + 10


def test_a_study_that_was_stopped_goes_on_where_it_was_unless_the_package_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [kill_counts.Count("run", "SIGKILL", 40, 38, lost=1), kill_counts.Count("merge", "full disk", 7, 7)]
    kept = tmp_path / "kills.csv.begun"
    kept.write_text(f"{kill_counts.digest()}\n{kill_counts.as_csv(counts)}")
    assert kill_counts.begun_in(kept) == counts
    monkeypatch.setattr(kill_counts, "digest", lambda: "another")
    assert kill_counts.begun_in(kept) == []
    assert kill_counts.begun_in(tmp_path / "never") == []


def test_a_flaw_is_seen() -> None:
    assert kill_counts.Count("run", "SIGKILL", 100, 93).flawless
    for flaw in ("unreadable", "lost", "split", "unequal", "tracebacks"):
        assert not kill_counts.Count("run", "SIGKILL", 100, 93, **{flaw: 1}).flawless
