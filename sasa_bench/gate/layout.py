"""Where native code lies in the arms: as it was built, or linked again in random order for each run or each pair."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sasa_bench.gate import relink
from sasa_bench.gate.relink import BUILT, PAIR
from sasa_bench.impls._native import compiler
from sasa_bench.results.cache import cache_directory

_PROBE = 'extern "C" int sasa_first() { return 1; }\nextern "C" int sasa_second() { return 2; }\n'


@dataclass
class Layout:
    """The layouts of one run.

    kind     one of relink.LAYOUTS
    folder   of the launcher and of the caches that hold what was linked; on the file system of the arms
    why      why the kind is BUILT although another one was wanted
    linked   arm -> the most native libraries that one of its processes has linked
    """

    kind: str = BUILT
    folder: Path = field(default_factory=Path)
    why: str = ""
    linked: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, str] = field(default_factory=dict)

    def environment(self, arm: str) -> dict[str, str]:
        """What a new process of this arm gets; {} where native code stays as it was built."""
        if self.kind == BUILT:
            return {}
        role = "head" if arm == "head" else "base"
        seed = secrets.token_hex(8) if self.kind == PAIR else self.seeds.setdefault(role, secrets.token_hex(8))
        cache = self.folder / f"{arm}-{seed}"
        _make_cache(cache)
        return _settings(self.folder, cache, seed)

    def settle(self) -> None:
        """Count what the processes that were started have linked; drop what no later one uses."""
        for cache in self.folder.glob("*-*") if self.kind != BUILT else ():
            arm = cache.name.partition("-")[0]
            found = len(list((cache / "native").glob("*.so")))
            self.linked[arm] = max(found, self.linked.get(arm, 0))
            if self.kind == PAIR:
                shutil.rmtree(cache, ignore_errors=True)

    def note(self) -> str:
        """A sentence on where the native code of this run lay; "" where nothing was asked for or linked."""
        if self.why:
            return f"layout: native code as it was built, because {self.why}"
        if self.kind == BUILT:
            return ""
        if not any(self.linked.values()):
            return ""
        counts = ", ".join(f"{arm} {self.linked.get(arm, 0)}" for arm in ("base", "head", "copy"))
        return f"layout: native libraries linked in random order for each {self.kind}: {counts}"


@contextmanager
def laid_out(kind: str, beside: Path) -> Iterator[Layout]:
    """The layouts of a run, in a folder `beside` that is removed afterwards.

    Where native code cannot be linked again on this machine, the layout is BUILT and says why.
    """
    if kind == BUILT:
        yield Layout()
        return
    folder = beside / f"layouts-{secrets.token_hex(4)}"
    try:
        reason = _cannot(folder)
        yield Layout(BUILT if reason else kind, folder, reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings(folder: Path, cache: Path, seed: str) -> dict[str, str]:
    return {
        "CXX": shlex.join([str(folder / relink.LAUNCHER), *compiler()]),
        "SASA_BENCH_CACHE": str(cache),
        relink.OBJECTS: str(_objects(folder)),
        relink.SEED: seed,
    }


def _objects(folder: Path) -> Path:
    """Where compiled objects are kept: in the user's cache, or for this run alone where that cannot be written."""
    own = cache_directory() / "objects"
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError:
        return folder / "objects"
    return own if os.access(own, os.W_OK) else folder / "objects"


def _make_cache(cache: Path) -> None:
    """A cache without native libraries that shares the rest with the user's."""
    cache.mkdir(parents=True, exist_ok=True)
    own = cache_directory()
    for entry in own.iterdir() if own.is_dir() else ():
        if entry.name not in ("native", "objects") and not (cache / entry.name).exists():
            (cache / entry.name).symlink_to(entry.resolve())


def _cannot(folder: Path) -> str:
    """Why the launcher cannot link a library of two functions; "" where it can."""
    if reason := relink.missing():
        return reason
    try:
        relink.launcher(folder)
        probe = folder / "probe"
        probe.mkdir()
        (probe / "probe.cpp").write_text(_PROBE, encoding="utf-8")
        settings = _settings(folder, probe, "1") | {relink.OBJECTS: str(probe)}
        command = [*shlex.split(settings["CXX"]), "-shared", "-fPIC", "probe.cpp", "-o", "probe.so"]
        done = subprocess.run(
            command, cwd=probe, env=os.environ | settings, capture_output=True, text=True, errors="replace"
        )
    except (OSError, RuntimeError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{relink.LINKER} does not link here: {said[0].strip() if said else f'exit status {done.returncode}'}"
