"""Which revision of its repository a file is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def revision(path: Path) -> tuple[str, bool] | None:
    """(commit of 12 digits, whether tracked files at `path` differ from it); None where git does not track `path`.

    A file that merely lies in somebody's repository, as an installed package in a project's .venv does, has no commit.
    git runs in the folder of `path`: give only paths whose code is run anyway.
    """
    folder = path if path.is_dir() else path.parent
    place = "." if path.is_dir() else path.name
    if not _git(folder, "ls-files", "--", place):
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--", place))


def _git(folder: Path, *words: str) -> str:
    # A hook or a CI job sets GIT_DIR and its like, which would point to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
