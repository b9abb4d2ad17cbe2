"""The arms of a gate: two revisions beside each other, and a copy of the first one that shows the noise."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sasa_bench
from sasa_bench.case import UserError
from sasa_bench.gate.git import Repository, find

PACKAGE = "sasa_bench"
INSTALLED = Path(sasa_bench.__file__).resolve().parent
"""The sasa-bench that runs."""

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "*.egg-info")
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
            return file.read_text(encoding="utf-8") if file.is_file() else None
        assert self.repository is not None
        content = self.repository.read(self.commit, place)
        return None if content is None else content.decode("utf-8")

    def copy_around(self, place: str, folder: Path) -> Path:
        """Copy the folder of a kernel file into `folder`; the path of the copy, which may hold no such file."""
        around = os.path.dirname(place) or "."
        if self.folder:
            _copy_folder(self.folder / around, folder / around, self.repository)
        else:
            assert self.repository is not None
            if self.repository.holds(self.commit, place):
                self.repository.extract(self.commit, around, folder)
        return folder / place

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
    fallback = others or (None if path.is_absolute() else path.as_posix())
    return [place or fallback for place in own]


@dataclass(frozen=True)
class Kernel:
    """A kernel file of an arm: where its copy lies, and a digest of the files around it."""

    path: str
    digest: str


@dataclass(frozen=True)
class Arm:
    """One side of a gate.

    name     base, head or copy
    folder   its own folder
    source   the revision or folder that it was made from
    python   what runs it
    package  the folder that holds the sasa_bench it runs; "" for `folder`
    commit   of the source; "" where git knows none
    kernels  kernel file, as it was given -> the arm's own
    """

    name: str
    folder: Path
    source: str
    python: str
    package: str = ""
    commit: str = ""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)

    @property
    def package_folder(self) -> Path:
        """The folder that holds its sasa_bench."""
        return Path(self.package) if self.package else self.folder

    @property
    def exports(self) -> Path:
        """Where its exported models lie. The copy takes those of base: exporting them again would give the same."""
        return (self.folder.with_name("base") if self.name == "copy" else self.folder) / "exports"

    def impl(self, name: str) -> str:
        """The name of an implementation, or the path of this arm's copy of a kernel file."""
        return self.kernels[name].path if name in self.kernels else name

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arm:
        """The inverse of to_dict."""
        kernels = {name: Kernel(**kernel) for name, kernel in values.get("kernels", {}).items()}
        return cls(**{**values, "folder": Path(values["folder"]), "kernels": kernels})


def sources(base: str, head: str) -> tuple[Source, Source]:
    """What the words of the command line mean. Raises ArmError for a word that is neither a folder nor a revision."""
    return resolve(base), resolve(head)


def merge_base(revision: str) -> str:
    """The newest common ancestor of a revision and HEAD. Raises ArmError or GitError where there is none."""
    repository = find(Path.cwd())
    if repository is None:
        raise ArmError(f"--merge-base needs a repository, and {Path.cwd()} is in none")
    return repository.merge_base(revision, "HEAD")


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


def set_up(
    base: str,
    head: str,
    out: Path,
    base_python: str | None = None,
    head_python: str | None = None,
    impls: Sequence[str] = (),
) -> list[Arm]:
    """Check out base, head and a second copy of base under `out`; returns the three arms in this order.

    `base` and `head` are git revisions of the current repository or folders. Each arm runs the sasa-bench that its
    source holds. Where neither source is a checkout of sasa-bench, both run the one at hand, and what differs is the
    kernel files among `impls`, each arm with its own copy of their folders, or the environments of two interpreters.

    Raises ArmError for an arm that does not exist, and where both are the same thing by mistake.
    """
    pythons = [_python(option) for option in (base_python, head_python)]
    both = sources(base, head)
    same_environment = pythons[0] == pythons[1]
    if same_environment and both[0].identity == both[1].identity:
        raise ArmError(
            f"base {base!r} and head {head!r} are the same {both[0].identity[0]}, so there is nothing to compare: "
            "give two revisions or folders, or two environments with --base-python and --head-python"
        )
    files = [impl for impl in dict.fromkeys(impls) if impl.endswith(".py")]
    own = [source.holds_package() for source in both]
    if not all(own) and (any(own) or (same_environment and not files)):
        lacking = both[own.index(False)].text
        raise ArmError(
            f"{lacking!r} has no {PACKAGE}/ to check out: give a checkout of sasa-bench, or compare the kernel files "
            "of a repository of your own with --impl FILE.py"
        )
    copies = untracked(out.absolute() / "arms")
    for left in copies.glob("layouts-*"):
        shutil.rmtree(left, ignore_errors=True)
    at_hand = _package_alone(copies / "installed") if not own[0] else None
    found = {file: places(Path(file), both) for file in files}
    arms = []
    for name, which in (("base", 0), ("head", 1), ("copy", 0)):
        source, folder = both[which], copies / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if own[0]:
            _copy_package(source, folder)
        kernels = {file: _kernel(source, file, found[file][which], folder / "kernels") for file in files}
        package = str(at_hand) if at_hand else ""
        arms.append(Arm(name, folder, source.text, pythons[which], package, source.commit, kernels))
    for file in files:
        if not any(Path(arm.kernels[file].path).is_file() for arm in arms):
            raise ArmError(f"{file} is in neither {base!r} nor {head!r}: give the path of a kernel file in them")
    return arms


def verify(arm: Arm, loaded: Mapping[str, Any]) -> None:
    """Raise ArmError unless the worker of an arm runs the package that the arm is to run."""
    expected = (arm.package_folder / PACKAGE).resolve()
    if Path(loaded["folder"]) != expected:
        raise ArmError(
            f"the {arm.name} arm loaded {loaded['folder']} instead of {expected}: is the package on its path?"
        )


def untracked(folder: Path) -> Path:
    """Make a folder for copies and traces, which git and a later gate of what is around it leave out; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text(_UNTRACKED, encoding="utf-8")
    return folder


def _package_alone(folder: Path) -> Path:
    """A folder with nothing but a link to the sasa-bench that runs: its environment stays off the paths of the arms."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / PACKAGE).symlink_to(INSTALLED, target_is_directory=True)
    return folder


def _folder(text: str) -> Source:
    folder = Path(text).expanduser().resolve()
    repository = find(folder)
    return Source(text, folder, repository, (repository.commit("HEAD") if repository else None) or "")


def _named(repository: Repository | None) -> str:
    return f"the repository in {repository.root}" if repository else "a repository (there is none here)"


def _python(option: str | None) -> str:
    if option is None:
        return sys.executable
    # Not resolved: the interpreter of a virtual environment is a link, and its place is what makes it that environment.
    found = shutil.which(option) if os.sep not in option else option
    if not found or not os.access(found, os.X_OK) or Path(found).is_dir():
        raise ArmError(f"{option} is not a Python interpreter for an arm: give the path of an interpreter")
    return str(Path(found).absolute())


def _copy_package(source: Source, folder: Path) -> None:
    if source.folder:
        shutil.copytree(source.folder / PACKAGE, folder / PACKAGE, ignore=_LEFT_OUT)
    else:
        assert source.repository is not None
        source.repository.extract(source.commit, PACKAGE, folder)


def _kernel(source: Source, file: str, place: str | None, folder: Path) -> Kernel:
    if place is None:  # in no source: used where it is, by every arm
        path = Path(file).resolve()
        return Kernel(str(path), _digest(path, [path]) if path.is_file() else "")
    path = source.copy_around(place, folder)
    around = sorted(p for p in folder.rglob("*") if p.is_file())
    return Kernel(str(path), _digest(folder, around) if path.is_file() else "")


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """A hash over names and contents."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(os.path.relpath(path, folder).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def _copy_folder(source: Path, target: Path, repository: Repository | None) -> None:
    if not source.is_dir():
        return
    if repository is None:
        shutil.copytree(source, target, ignore=_left_out, dirs_exist_ok=True)
        return
    for path in repository.files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _left_out(folder: str, names: list[str]) -> set[str]:
    copies = {name for name in names if _is_untracked(Path(folder, name))}
    return _LEFT_OUT(folder, names) | copies


def _is_untracked(folder: Path) -> bool:
    marker = folder / ".gitignore"
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == _UNTRACKED


def _below(path: Path, folder: Path) -> str | None:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return None
