"""The arms of a gate: two revisions beside each other, and a copy of the first one that shows the noise."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sasa_bench
from sasa_bench.gate.git import Repository
from sasa_bench.gate.sources import LEFT_OUT, PACKAGE, ArmError, Source, copy_around, places, sources, untracked
from sasa_bench.impls import names

INSTALLED = Path(sasa_bench.__file__).resolve().parent
"""The sasa-bench that runs."""


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
    uncommitted  whether the source is a folder with files that are not those of `commit`
    kernels  kernel file, as it was given -> the arm's own
    """

    name: str
    folder: Path
    source: str
    python: str
    package: str = ""
    commit: str = ""
    uncommitted: bool = False
    kernels: Mapping[str, Kernel] = field(default_factory=dict)

    @property
    def package_folder(self) -> Path:
        """The folder that holds its sasa_bench."""
        return Path(self.package) if self.package else self.folder

    @property
    def exports(self) -> Path:
        """Where its exported models lie. The copy takes those of base: exporting them again would give the same."""
        return self._made / "exports"

    @property
    def extensions(self) -> Path:
        """Where torch.utils.cpp_extension builds, which knows an extension by its name alone; the copy as above."""
        return self._made / "extensions"

    @property
    def _made(self) -> Path:
        return self.folder.with_name("base") if self.name == "copy" else self.folder

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
        no_file = [f"{impl!r} is no file" for impl in impls if not impl.endswith(".py") and impl not in names()]
        raise ArmError(
            f"{', '.join([*no_file, f'{lacking!r} has no {PACKAGE}/ to check out'])}: give a checkout of sasa-bench, "
            "or compare the kernel files of a repository of your own with --impl FILE.py"
        )
    copies = untracked(out.absolute() / "arms")
    for left in copies.glob("layouts-*"):
        shutil.rmtree(left, ignore_errors=True)
    at_hand = _package_alone(copies / "installed") if not own[0] else None
    found = {file: places(Path(file), both) for file in files}
    if at_hand and same_environment:
        for file, where in found.items():
            if None in where:
                raise ArmError(
                    f"{file} lies in neither {base!r} nor {head!r}, so both arms would run the same file: "
                    "start the gate in the repository of the kernel"
                )
    uncommitted = [source.uncommitted for source in both]
    arms = []
    with tempfile.TemporaryDirectory(dir=copies) as scratch:
        trees = [source.checked_out(Path(scratch) / str(n)) for n, source in enumerate(both)] if files else []
        for name, which in (("base", 0), ("head", 1), ("copy", 0)):
            source, folder = both[which], copies / name
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            if own[0]:
                _copy_package(source, folder)
            own_repository = source.repository if source.folder else None  # a commit holds no more than it tracks
            kernels = {
                file: _kernel(trees[which], file, found[file][which], folder / "kernels", own_repository)
                for file in files
            }
            package = str(at_hand) if at_hand else ""
            state = source.commit, uncommitted[which]
            arms.append(Arm(name, folder, source.text, pythons[which], package, *state, kernels))
    for file in files:
        if not any(Path(arm.kernels[file].path).is_file() for arm in arms):
            raise ArmError(f"{file} is in neither {base!r} nor {head!r}: give the path of a kernel file in them")
    return arms


def verify(arm: Arm, loaded: Mapping[str, Any]) -> None:
    """Raise ArmError unless the worker of an arm runs the package that the arm is to run."""
    expected = (arm.package_folder / PACKAGE).resolve()
    if Path(loaded["folder"]) != expected:
        raise ArmError(
            f"the {arm.name} arm loaded {loaded['folder']} instead of {expected}: remove the other one from its path"
        )


def _package_alone(folder: Path) -> Path:
    """A folder with nothing but a link to the sasa-bench that runs: its environment stays off the paths of the arms."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / PACKAGE).symlink_to(INSTALLED, target_is_directory=True)
    return folder


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
        shutil.copytree(source.folder / PACKAGE, folder / PACKAGE, ignore=LEFT_OUT)
    else:
        assert source.repository is not None
        source.repository.extract(source.commit, PACKAGE, folder)


def _kernel(tree: Path, file: str, place: str | None, folder: Path, repository: Repository | None) -> Kernel:
    if place is None:  # in no source: used where it is, by every arm
        path = Path(file).resolve()
        return Kernel(str(path), _digest(path, [path]) if path.is_file() else "")
    path = copy_around(tree, place, folder, repository)
    around = sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    return Kernel(str(path), _digest(folder, around) if path.is_file() else "")


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """A hash over names and contents; of a link that leads to no file, over where it leads."""
    whole = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else os.readlink(path).encode()
        whole.update(os.path.relpath(path, folder).encode() + b"\0" + content + b"\0")
    return whole.hexdigest()[:16]
