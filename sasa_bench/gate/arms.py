"""The arms of a gate: two revisions beside each other, and a copy of the first one that shows the noise."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_bench.case import UserError

PACKAGE = "sasa_bench"


class ArmError(UserError):
    """An arm that cannot be set up, or that runs something else than it should; the message says what to do."""


@dataclass(frozen=True)
class Arm:
    """name: base, head or copy; folder: holds the package it runs; source: the revision or folder it was made from."""

    name: str
    folder: Path
    source: str
    python: str


def set_up(
    base: str, head: str, out: Path, base_python: str | None = None, head_python: str | None = None
) -> list[Arm]:
    """Check out base, head and a second copy of base under `out`; returns the three arms in this order.

    `base` and `head` are git revisions of the current repository or folders that hold the package.
    Raises ArmError for an arm that does not exist, and where both are the same thing by mistake.
    """
    pythons = (base_python or sys.executable, head_python or sys.executable)
    same_environment = pythons[0] == pythons[1]
    if same_environment and _identity(base) == _identity(head):
        raise ArmError(
            f"base {base!r} and head {head!r} are the same {_identity(base)[0]}, so there is nothing to compare: "
            "give two revisions or folders, or two environments with --base-python and --head-python"
        )
    arms = []
    for name, source, python in (("base", base, pythons[0]), ("head", head, pythons[1]), ("copy", base, pythons[0])):
        folder = out / "arms" / name
        if folder.exists():
            shutil.rmtree(folder)
        _fill(folder, source)
        arms.append(Arm(name, folder, source, python))
    return arms


def verify(arm: Arm, loaded: dict[str, Any]) -> None:
    """Raise ArmError unless the worker of an arm runs the package in the arm's folder."""
    expected = (arm.folder / PACKAGE).resolve()
    if Path(loaded["folder"]) != expected:
        raise ArmError(
            f"the {arm.name} arm loaded {loaded['folder']} instead of {expected}: is the package on its path?"
        )


def _identity(source: str) -> tuple[str, str]:
    if Path(source).is_dir():
        return "folder", str(Path(source).resolve())
    found = _git("rev-parse", "--verify", "--quiet", f"{source}^{{commit}}")
    if found.returncode:
        raise ArmError(f"{source!r} is neither a folder nor a revision of this repository")
    return "commit", found.stdout.decode().strip()


def _fill(folder: Path, source: str) -> None:
    folder.mkdir(parents=True)
    if Path(source).is_dir():
        package = Path(source) / PACKAGE
        if not package.is_dir():
            raise ArmError(f"{source} holds no {PACKAGE}/ folder: give the root of a checkout")
        shutil.copytree(package, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        return
    archive = _git("archive", source, PACKAGE)
    if archive.returncode:
        raise ArmError(f"{source!r} has no {PACKAGE}/ to check out: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, check=False)
    root = top.stdout.decode().strip() or "."
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=False)
