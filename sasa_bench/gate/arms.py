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
INSTALLED = Path(sasa_bench.__file__).resolve().parents[1]
"""The folder that holds the sasa-bench that runs."""

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "*.egg-info")


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

    def read(self, path: Path) -> str | None:
        """A file by its path as given on the command line, as this source has it; None where it has none."""
        relative = self._relative(path)
        if relative is None:
            return None
        if self.folder:
            file = self.folder / relative
            return file.read_text(encoding="utf-8") if file.is_file() else None
        assert self.repository is not None
        content = self.repository.read(self.commit, relative)
        return None if content is None else content.decode("utf-8")

    def copy_kernel(self, path: Path, folder: Path) -> Path:
        """Copy the folder of a kernel file into `folder`; the path of the copy, which may hold no such file.

        What stands in no folder of the source, such as an absolute path elsewhere, is used where it is.
        """
        relative = self._relative(path)
        if relative is None:
            return path.resolve()
        around = os.path.dirname(relative) or "."
        if self.folder:
            _copy_folder(self.folder / around, folder / around, self.repository)
        else:
            assert self.repository is not None
            if self.repository.holds(self.commit, relative):
                self.repository.extract(self.commit, around, folder)
        return folder / relative

    def _relative(self, path: Path) -> str | None:
        """`path` from the top of the source; None for one outside of it."""
        if self.folder:
            if not path.is_absolute():
                return path.as_posix()
            return _below(path, self.folder)
        assert self.repository is not None
        return _below(path.absolute(), self.repository.root)


@dataclass(frozen=True)
class Kernel:
    """A kernel file of an arm: where its copy lies, and a digest of the Python files beside it."""

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
    """A folder that holds the package, a revision, or any other folder, in this order."""
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
    kernel files among `impls`: each arm gets its own copy of their folders.

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
    if not all(own) and (any(own) or not files):
        lacking = both[own.index(False)].text
        raise ArmError(
            f"{lacking!r} has no {PACKAGE}/ to check out: give a checkout of sasa-bench, or compare the kernel files "
            "of a repository of your own with --impl FILE.py"
        )
    arms = []
    for name, source, python in (
        ("base", both[0], pythons[0]),
        ("head", both[1], pythons[1]),
        ("copy", both[0], pythons[0]),
    ):
        folder = out.absolute() / "arms" / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if own[0]:
            _copy_package(source, folder)
        kernels = {file: _kernel(source, file, folder / "kernels") for file in files}
        package = "" if own[0] else str(INSTALLED)
        arms.append(Arm(name, folder, source.text, python, package, source.commit, kernels))
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


def _kernel(source: Source, file: str, folder: Path) -> Kernel:
    path = source.copy_kernel(Path(file), folder)
    return Kernel(str(path), _digest(path))


def _digest(kernel: Path) -> str:
    """A hash over the kernel file and the Python files in its folder; "" where there is no such file."""
    if not kernel.is_file():
        return ""
    whole = hashlib.sha256()
    for path in [kernel, *sorted(p for p in kernel.parent.glob("*.py") if p != kernel)]:
        whole.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def _copy_folder(source: Path, target: Path, repository: Repository | None) -> None:
    if not source.is_dir():
        return
    if repository is None:
        shutil.copytree(source, target, ignore=_LEFT_OUT, dirs_exist_ok=True)
        return
    for path in repository.files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _below(path: Path, folder: Path) -> str | None:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return None
