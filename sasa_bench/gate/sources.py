"""What the arms of a gate are made from: folders and commits, and how their files are copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sasa_bench.case import UserError
from sasa_bench.gate.git import Repository, find

PACKAGE = "sasa_bench"

LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "*.egg-info")
_UNTRACKED = "*\n"
"""The .gitignore of a folder that holds copies: neither git nor a later copy of what is around it takes them."""


class ArmError(UserError):
    """An arm that cannot be set up, or that runs something else than it should; the message states what to do."""


@dataclass(frozen=True)
class Source:
    """What an arm is made from: a folder, or a commit of `repository`.

    text     as it was given
    folder   the folder; None for a commit
    commit   the full hash; of a folder that of its HEAD, or ""
    """

    text: str
    folder: Path | None
    repository: Repository | None
    commit: str

    @property
    def identity(self) -> tuple[str, str]:
        """(folder or commit, which one): two sources with the same one are the same thing."""
        return ("folder", str(self.folder)) if self.folder else ("commit", self.commit)

    @property
    def uncommitted(self) -> bool:
        """Whether it is a folder with files that are not those of a commit."""
        if self.folder is None:
            return False
        return self.repository is None or not self.commit or self.repository.is_changed(self.folder)

    def holds_package(self) -> bool:
        """Whether it is a checkout of sasa-bench."""
        if self.folder:
            return (self.folder / PACKAGE / "__init__.py").is_file()
        assert self.repository is not None
        return self.repository.holds(self.commit, f"{PACKAGE}/__init__.py")

    def read(self, place: str) -> str | None:
        """A file by its path from the top of this source; None where it has none."""
        if self.folder:
            file = self.folder / place
            content = file.read_bytes() if file.is_file() else None
        else:
            assert self.repository is not None
            content = self.repository.read(self.commit, place)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArmError(f"{place} of {self.text!r} is not UTF-8 ({error.reason}): save it as UTF-8") from None

    def checked_out(self, scratch: Path) -> Path:
        """A folder with all files of this source: its own, or one at `scratch`, which then holds the commit."""
        if self.folder:
            return self.folder
        assert self.repository is not None
        self.repository.extract(self.commit, ".", scratch)
        return scratch

    @property
    def top(self) -> Path:
        """The folder that paths in this source start from."""
        if self.folder:
            return self.folder
        assert self.repository is not None
        return self.repository.root


def places(path: Path, sources: Sequence[Source]) -> list[str | None]:
    """Where each source has a file of the command line, from its top; None for all where it lies in none of them.

    A path is meant from the current folder, as everywhere. A source that does not hold that folder has the file where
    the others have it, or where the words of a relative path say: `--base old --head new kernels/a.py`.
    """
    own = [_below(path.absolute(), source.top) for source in sources]
    others = next((place for place in own if place), None)
    words = os.path.normpath(path)
    fallback = others or (None if path.is_absolute() or words.startswith("..") else Path(words).as_posix())
    return [place or fallback for place in own]


def sources(base: str, head: str) -> tuple[Source, Source]:
    """What the words of the command line mean. Raises ArmError for a word that is neither a folder nor a revision."""
    return resolve(base), resolve(head)


def merge_base(revision: str, head: str) -> str:
    """The newest common ancestor of a revision and of head, or of HEAD where head is a folder of no such repository.

    Raises ArmError or GitError where there is none.
    """
    repository = find(Path.cwd())
    if repository is None:
        raise ArmError(f"--merge-base: {Path.cwd()} is in no git repository; run the gate inside one")
    own = resolve(head).commit
    return repository.merge_base(revision, own if own and repository.commit(own) else "HEAD")


def resolve(text: str) -> Source:
    """A checkout of sasa-bench in a folder, a revision, or any other folder, in this order; `./NAME` is a folder."""
    folder = Path(text)
    is_path = text in (".", "..") or text.startswith(("./", "../", "/", "~"))
    if folder.is_dir() and (is_path or (folder / PACKAGE / "__init__.py").is_file()):
        return _folder(text)
    repository = find(Path.cwd())
    commit = repository.commit(text) if repository else None
    if repository and commit:
        return Source(text, None, repository, commit)
    if folder.is_dir():
        return _folder(text)
    shallow = repository is not None and repository.is_shallow()
    more = "; this clone is shallow: fetch more history (git fetch --unshallow)" if shallow else ""
    raise ArmError(f"{text!r} is neither a folder nor a revision of {_named(repository)}{more}")


def _folder(text: str) -> Source:
    folder = Path(text).expanduser().resolve()
    repository = find(folder)
    return Source(text, folder, repository, (repository.commit("HEAD") if repository else None) or "")


def _named(repository: Repository | None) -> str:
    return f"the repository in {repository.root}" if repository else "a repository (there is none here)"


def untracked(folder: Path) -> Path:
    """Make a folder for copies and traces, which git and a later gate of what is around it leave out; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text(_UNTRACKED, encoding="utf-8")
    return folder


def copy_around(tree: Path, place: str, folder: Path, repository: Repository | None) -> Path:
    """Copy the folder of a kernel file of `tree` into `folder`; the path of the copy, which may hold no such file.

    What the `repository` of the tree ignores is left out. Relative links are replaced by what they lead to in `tree`,
    so that each revision has its own; a kernel that is a link is copied with the folder of the file that it leads to.
    """
    if not (tree / place).is_file():
        return folder / place
    whole, real = tree.resolve(), (tree / place).resolve()
    if real.is_relative_to(whole):
        place = real.relative_to(whole).as_posix()
    around = Path(place).parent
    for path in _files(tree / around, repository):
        _copy_file(path, folder / around / path.relative_to(tree / around))
    return folder / place


def _files(folder: Path, repository: Repository | None) -> list[Path]:
    """The files and links below a folder that git does not ignore, or all but what is never part of a kernel."""
    if repository:
        return repository.files(folder)
    found = []
    for where, names, files in os.walk(folder):
        out = _left_out(where, [*names, *files])
        links = [name for name in names if Path(where, name).is_symlink()]
        names[:] = [name for name in names if name not in out and name not in links]
        found += [Path(where, name) for name in [*files, *links] if name not in out]
    return found


def _copy_file(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and (os.path.isabs(os.readlink(path)) or not path.exists()):
        copy.unlink(missing_ok=True)
        copy.symlink_to(os.readlink(path))
    elif path.is_dir():
        shutil.copytree(path, copy, ignore=_left_out, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    else:
        shutil.copy2(path, copy)


def _left_out(folder: str, names: list[str]) -> set[str]:
    copies = {name for name in names if _is_untracked(Path(folder, name))}
    return LEFT_OUT(folder, names) | copies


def _is_untracked(folder: Path) -> bool:
    marker = folder / ".gitignore"
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == _UNTRACKED


def _below(path: Path, folder: Path) -> str | None:
    """`path` from the top of `folder`; a link is not followed, because it may lead elsewhere in another revision."""
    try:
        return (path.parent.resolve() / path.name).relative_to(folder.resolve()).as_posix()
    except ValueError:
        return None
