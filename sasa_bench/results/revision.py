"""Which revision of its repository a file is of, and which files of the package decide what is measured."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

READERS = ("cli", "gate", "profiling", "report", "paper")
"""Rooms of the package that start measurements or read them: a change there changes no row of a run."""
SOURCES = (".py", ".h", ".cpp", ".cu", ".csv", ".toml")
COMPILED = (".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp")
"""Sources that a kernel file may compile: those beside it count as part of it."""
Stamps = dict[Path, tuple[int, int]]
"""File -> when it was written, in ns, and its size: a change shows without reading it."""


def code_digest(package: Path) -> str:
    """12 digits of the content of every file of the package `package` that has a part in a measurement."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        place = path.relative_to(package)
        if path.suffix in SOURCES and place.parts[0] not in READERS:
            digest.update(f"{place.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def stamps(file: Path) -> Stamps:
    """Of every source in the folder of a kernel file."""
    folder = file.resolve().parent
    return {path: _stamp(path) for path in folder.iterdir() if path.suffix in (".py", *COMPILED)}


def changed(before: Stamps) -> bool:
    """Whether one of these files is another one now; files that were added since are not among them."""
    return any(_stamp(path) != stamp for path, stamp in before.items())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, -1
    return found.st_mtime_ns, found.st_size


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


def git_environment() -> dict[str, str]:
    """The environment without GIT_DIR and its like, by which a hook or a CI job would point to another repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
            env=git_environment(),
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
