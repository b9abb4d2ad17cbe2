"""Native code compiled on this machine: the compiler, the instruction set, and the cache of what was compiled.

Environment variables: CXX (the compiler, with a launcher before it if you like: "ccache g++"), SASA_BENCH_ISA (the
instruction set), SASA_BENCH_CACHE (the folder of the cache).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from sasa_bench.results.cache import cache_directory

COMPILERS = ("c++", "g++", "clang++")
INSTALL = "apt-get install g++ (or the like), or set CXX to a compiler"

_WRITE_ELSEWHERE = "the cache {} cannot be written to: set SASA_BENCH_CACHE to a folder that can"

AVX512 = ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma", "f16c")

# Instruction sets from the most to the least capable: compiler flags, and the processor flags they need.
ISAS: dict[str, tuple[list[str], set[str]]] = {
    # As avx512_wide, and products of bfloat16 matrices on tiles.
    "avx512_amx": (
        ["-DSASA_WIDE", *(f"-m{flag}" for flag in AVX512), "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        {*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"},
    ),
    # Vectors of 512 bits, chosen where the processor has two units for their products (`has_two_512_bit_units`).
    "avx512_wide": (["-DSASA_WIDE", *(f"-m{flag}" for flag in AVX512)], set(AVX512)),
    # As avx512, and products of pairs of bfloat16, which are worth it where vectors of 512 bits are not.
    "avx512_bf16": ([*(f"-m{flag}" for flag in AVX512), "-mavx512bf16"], {*AVX512, "avx512_bf16"}),
    "avx512": ([f"-m{flag}" for flag in AVX512], set(AVX512)),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], {"avx2", "fma", "f16c"}),
    "portable": ([], set()),
}


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this processor, from /proc/cpuinfo; empty where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


@cache
def _processor() -> tuple[str, int, int]:
    """Vendor, family and model of this processor, from /proc/cpuinfo; "", 0, 0 where there is no such file."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found.get("vendor_id", ""), int(found.get("cpu family", 0)), int(found.get("model", 0))


# Intel's client processors with AVX-512, by model: Cannon, Ice, Tiger and Rocket Lake. They have one unit.
_INTEL_CLIENT = {0x66, 0x7D, 0x7E, 0x8C, 0x8D, 0xA7}


def has_two_512_bit_units() -> bool:
    """Whether two products of 512-bit vectors start in a cycle: Intel's servers, AMD from Zen 5 on.

    Some of Intel's first Xeons with AVX-512 (Silver and Bronze) have one unit and are not told from those with two.
    """
    vendor, family, model = _processor()
    if vendor == "AuthenticAMD":
        return family >= 26
    return vendor == "GenuineIntel" and not (family == 6 and model in _INTEL_CLIENT)


def executable_isas() -> list[str]:
    """The instruction sets that this machine can run, the fastest first.

    That is the most capable one, but on a processor with one 512-bit unit vectors of 256 bits come first.
    """
    runnable = [isa for isa, (_, needed) in ISAS.items() if needed <= cpu_flags()]
    if "avx512_wide" in runnable and not has_two_512_bit_units():
        runnable.remove("avx512_wide")
        runnable.insert(runnable.index("avx512") + 1, "avx512_wide")
    return runnable


def chosen_isa() -> str:
    """The instruction set to build for: SASA_BENCH_ISA where it is set, else the fastest one that this machine runs.

    Raises ValueError for a name that is not a build, RuntimeError for a build that this machine cannot run.
    """
    runnable = executable_isas()
    isa = os.environ.get("SASA_BENCH_ISA") or runnable[0]
    if isa not in ISAS:
        raise ValueError(f"SASA_BENCH_ISA={isa} is not a build; choose one of {', '.join(ISAS)}, or unset it")
    if isa not in runnable:
        lacking = ", ".join(sorted(ISAS[isa][1] - cpu_flags()))
        raise RuntimeError(
            f"SASA_BENCH_ISA={isa} needs {lacking}, which this processor lacks; "
            f"choose one of {', '.join(runnable)}, or unset it"
        )
    return isa


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, split as a shell would, else the first of `COMPILERS` on the PATH.

    Raises RuntimeError, with the command that helps, where there is none.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError as error:
        raise RuntimeError(f"CXX={named} is no command ({error}): quote it as in a shell, or unset it") from None
    for words in commands:
        if all(shutil.which(word) for word in words if not word.startswith("-")):
            return words
    raise RuntimeError(f"there is no C++ compiler ({f'CXX={named}' if named else ', '.join(COMPILERS)}): {INSTALL}")


def missing_compiler() -> str | None:
    """None, or that there is no C++ compiler, with the command that installs one."""
    try:
        compiler()
    except RuntimeError as error:
        return str(error)
    return None


def bare_compiler() -> str:
    """The compiler alone, without a launcher such as ccache and without options. Raises as `compiler`."""
    return next(word for word in reversed(compiler()) if not word.startswith("-"))


def describe_compiler() -> str:
    """The compiler and its version, or why there is none, on one line."""
    try:
        command = compiler()
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30
        ).stdout.splitlines()
    except RuntimeError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(command)} does not run: {error}"
    return f"{shlex.join(command)}, {said[0] if said else 'of no known version'}"


@dataclass(frozen=True)
class Library:
    """A shared library made of one source file, in the cache under a name that changes with all that it is made of.

    name     a word for people
    source   the file to compile
    headers  files that it includes and that may change
    flags    for the compiler, before the source
    links    for the linker, after it
    folders  flags that say where headers and libraries lie, which is not part of the name
    versions whatever else a build depends on, such as the version of torch
    loaded   the file that this process uses, whatever happens to what it was made of; None while there is none
    """

    name: str
    source: Path
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    loaded: Path | None = None

    @property
    def path(self) -> Path:
        """Where the library is or will be. A compiler chosen by CXX has a library of its own."""
        if self.loaded:
            return self.loaded
        parts = (platform.machine(), os.environ.get("CXX", ""), self.flags, self.links, self.versions)
        digest = hashlib.sha256(repr(parts).encode())
        for file in (self.source, *self.headers):
            digest.update(file.name.encode() + file.read_bytes())
        return cache_directory() / "native" / f"{self.name}-{digest.hexdigest()[:16]}.so"

    def is_built(self) -> bool:
        """Whether the cache holds it."""
        return os.path.exists(self.path)  # False, too, where nobody may look

    def missing(self) -> str | None:
        """None, or what keeps it from being built here and what helps; None where it is built. Compiles nothing."""
        if self.is_built():
            return None
        if not self.source.is_file():
            return f"{self.source.name} is not in {self.source.parent}: install sasa-bench again"
        return missing_compiler() or _unwritable()

    def build(self) -> Path:
        """Compiles it, unless the cache holds it and it loads on this system, and returns its path.

        Several processes may build it at once: one compiles, the others wait. A library that was compiled on another
        system, against newer system libraries, is compiled again.

        Raises RuntimeError, on one line, where it cannot be built or loaded.
        """
        path = self.path
        error = _loading_error(path)
        if error is None:
            return path
        if reason := missing_compiler() or _unwritable():
            raise RuntimeError(f"{path} does not load here ({error}), and {reason}" if os.path.exists(path) else reason)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if _loading_error(path):
                    self._compile(path)
        except OSError as failed:
            raise RuntimeError(f"{_WRITE_ELSEWHERE.format(path.parent)} ({failed})") from failed
        if error := _loading_error(path):
            raise RuntimeError(f"{path} is compiled and does not load: {error}")
        return path

    def _compile(self, path: Path) -> None:
        partial = path.with_suffix(f".{os.getpid()}.part")
        words = compiler()
        common = ["-std=c++20", "-Wno-psabi", "-Wno-ignored-attributes", "-shared", "-fPIC", "-pthread"]
        command = [*words, *common, *self.flags, *self.folders, str(self.source), *self.links, "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                said = done.stderr.strip().splitlines()
                errors = [line for line in said if "error" in line] or said or [f"exit status {done.returncode}"]
                raise RuntimeError(f"{shlex.join(words)} cannot compile {self.source.name}: {errors[0].strip()}")
            if not partial.exists():
                raise RuntimeError(f"{shlex.join(words)} wrote no library: set CXX to a C++ compiler, or unset it")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def build(libraries: Sequence[Library]) -> list[Path]:
    """Builds several libraries at once. Raises as `Library.build`."""
    with ThreadPoolExecutor(max(1, len(libraries))) as pool:
        return list(pool.map(Library.build, libraries))


def _loading_error(path: Path) -> str | None:
    """None, or why a library does not load here: there is none, or the dynamic linker refuses it."""
    if not os.path.exists(path):
        return "there is no such file"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return None


def _unwritable() -> str | None:
    """None, or that nothing can be written to the cache, with the variable to set."""
    folder = cache_directory() / "native"
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return _WRITE_ELSEWHERE.format(folder)
