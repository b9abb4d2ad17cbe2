"""What the gate asks of a git repository, with git's own sentence and the remedy where it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sasa_bench.case import UserError

_OF_ONE_REPOSITORY = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_NAMESPACE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE"),
)
"""What a hook sets for its own repository; here the folder alone says which one is meant."""


class GitError(UserError):
    """Git refused; the message has git's own sentence and what to do."""


@dataclass(frozen=True)
class Repository:
    """The repository that holds `folder`, with its top folder `root`."""

    root: Path

    def commit(self, revision: str) -> str | None:
        """The full hash of a revision; None for a word that names none."""
        found = _git(self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        return None if found.returncode else found.stdout.decode().strip()

    def holds(self, commit: str, path: str) -> bool:
        """Whether a commit has that file or folder, relative to the root."""
        return not _git(self.root, "cat-file", "-e", f"{commit}:{path}").returncode

    def read(self, commit: str, path: str) -> bytes | None:
        """A file of a commit, by links that lead to others of it; None where it has none."""
        given = f"{commit}:{path}\n".encode()
        found = _git(self.root, "cat-file", "--batch", "--follow-symlinks", given=given).stdout
        header, _, content = found.partition(b"\n")
        match header.split():
            case [_, b"blob", size]:
                return content[: int(size)]
        return None

    def extract(self, commit: str, path: str, folder: Path) -> None:
        """Write what a commit has below `path` (relative to the root) into `folder`, as a checkout has it.

        Raises GitError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            index = {"GIT_INDEX_FILE": os.path.join(scratch, "index"), "GIT_LITERAL_PATHSPECS": "1"}
            names = b""
            for step in (
                ["read-tree", commit],
                ["ls-files", "-z", "--cached", "--", path],
                ["checkout-index", "-z", "--stdin", "--force", f"--prefix={folder.absolute()}/"],
            ):
                done = _git(self.root, *step, environment=index, given=names)
                if done.returncode:
                    raise GitError(f"git {step[0]}, for {path} of {commit[:12]}: {_said(done)}")
                names = done.stdout

    def merge_base(self, one: str, other: str) -> str:
        """The hash of the newest common ancestor. Raises GitError, and says where the history is cut off."""
        found = _git(self.root, "merge-base", one, other)
        if not found.returncode:
            return found.stdout.decode().strip()
        if self.is_shallow():
            raise GitError(
                f"this clone is shallow and holds no common ancestor of {one} and {other}: "
                "fetch more history (git fetch --unshallow, or fetch-depth: 0 in a workflow)"
            )
        said = _said(found)
        raise GitError(f"{one} and {other} have no common ancestor here" + (f": {said}" if said else ""))

    def is_shallow(self) -> bool:
        """Whether the history of this clone is cut off."""
        return _git(self.root, "rev-parse", "--is-shallow-repository").stdout.strip() == b"true"

    def is_changed(self, folder: Path) -> bool:
        """Whether files below a folder, ignored ones aside, differ from those of HEAD."""
        return bool(_git(self.root, "status", "--porcelain", "--", str(folder)).stdout.strip())

    def between(self, good: str, bad: str) -> list[str]:
        """The commits after `good` up to `bad`, oldest first, along the first parents. Raises GitError."""
        ancestor = _git(self.root, "merge-base", "--is-ancestor", good, bad)
        if ancestor.returncode:
            cut_off = (
                ": this clone is shallow, fetch more history"
                if self.is_shallow()
                else ": give an ancestor of --bad as --good"
            )
            raise GitError(f"{good} is not an ancestor of {bad}{cut_off}")
        found = _git(self.root, "rev-list", "--first-parent", "--reverse", f"{good}..{bad}")
        if found.returncode:
            raise GitError(f"git rev-list {good}..{bad}: {_said(found)}")
        return found.stdout.decode().split()

    def subject(self, commit: str) -> str:
        """The first line of the message of a commit."""
        return _git(self.root, "show", "--no-patch", "--format=%s", commit).stdout.decode(errors="replace").strip()

    def files(self, folder: Path) -> list[Path]:
        """What lies below `folder` and git does not ignore, tracked or not."""
        found = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = [name for name in found.stdout.decode(errors="surrogateescape").split("\0") if name]
        return [path for name in names if (path := folder / name).is_symlink() or path.is_file()]


def find(folder: Path) -> Repository | None:
    """The repository around `folder`; None outside of any. Raises GitError where git refuses to use the one found."""
    try:
        found = _git(folder, "rev-parse", "--show-toplevel")
    except OSError:
        return None
    if not found.returncode:
        return Repository(Path(os.fsdecode(found.stdout).rstrip("\n")))
    said = _said(found)
    if "not a git repository" in said or "must be run in a work tree" in said:
        return None
    if "dubious ownership" in said:
        named = re.search(r"'(.*)'", said)
        place = named[1] if named else str(folder.resolve())
        raise GitError(f"git: {said}; if you trust it: git config --global --add safe.directory {place}")
    raise GitError(f"git: {said}")


def _git(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    known = {name: value for name, value in os.environ.items() if name not in _OF_ONE_REPOSITORY} | {"LC_ALL": "C"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, check=False, env=known | dict(environment or {}), input=given)


def _said(found: subprocess.CompletedProcess[bytes]) -> str:
    lines = found.stderr.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("fatal: ") if lines else ""
