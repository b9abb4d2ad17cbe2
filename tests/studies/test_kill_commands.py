"""A small part of the study of commands that are ended: nothing is lost, and the next start gives the same table."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import kill_commands
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and signals as Linux has them")
def test_commands_that_are_ended_anywhere_lose_nothing(tmp_path: Path) -> None:
    # The study replaces parts of the package, so it has a process of its own.
    seed = random.randrange(1 << 31)
    script = [sys.executable, kill_commands.__file__, "--kills", "1", "--seed", str(seed), "--out"]
    done = subprocess.run([*script, str(tmp_path / "kills.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "kills.csv").read_text().splitlines()) >= 1 + 10


def test_a_flaw_is_seen() -> None:
    assert kill_commands.Count("run", "SIGKILL", 100, 93).flawless
    for flaw in ("unreadable", "lost", "split", "unequal", "tracebacks"):
        assert not kill_commands.Count("run", "SIGKILL", 100, 93, **{flaw: 1}).flawless
