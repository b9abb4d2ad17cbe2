"""Native code: which compiler is taken, what is built again and what is not, and what a user reads where it fails."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from agreement import agree
from fused_builds import ATTENTION_BUILDS, quick

from sasa_bench.case import Case
from sasa_bench.impls import _native, onnx_fused
from sasa_bench.impls._native import Library

CSRC = Path(_native.__file__).parent / "csrc"
needs_compiler = pytest.mark.skipif(_native.missing_compiler() is not None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


@pytest.fixture
def library(folder: Path) -> Library:
    (folder / "seven.cpp").write_text('#include "seven.h"\nextern "C" int seven() { return SEVEN; }\n')
    (folder / "seven.h").write_text("#define SEVEN 7\n")
    return Library("seven", folder / "seven.cpp", (folder / "seven.h",))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def counting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher before the compiler, as ccache is; it writes a line to the returned file for each call."""
    log = folder / "calls"
    log.touch()
    launcher = script(folder / "launcher", f'echo called >> "{log}"\nexec "$@"')
    monkeypatch.setenv("CXX", f"{launcher} {_native.bare_compiler()} -O1")
    return log


def call(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).seven())


@needs_compiler
def test_a_library_is_compiled_once_and_found_again(library: Library, counting: Path) -> None:
    assert not library.is_built()
    assert library.missing() is None
    assert call(library.build()) == 7
    assert library.is_built()
    assert library.build() == library.path
    assert counting.read_text().count("called") == 1
    assert {path.suffix for path in library.path.parent.iterdir()} <= {".so", ".lock"}


@needs_compiler
@pytest.mark.parametrize("name", ["g++", "clang++", "ccache g++"])
def test_any_compiler_that_is_here_builds(name: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    if not all(shutil.which(word) for word in name.split()):
        pytest.skip(f"{name} is not installed")
    default = library.path
    monkeypatch.setenv("CXX", name)
    assert library.path != default
    assert call(library.build()) == 7
    assert _native.describe_compiler().startswith(f"{name}, ")
    assert _native.bare_compiler() == name.split()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("clang++", b"clang version"),
        pytest.param("ccache g++", b"GCC: (", marks=pytest.mark.exhaustive),  # a small library shows what differs
    ],
)
def test_the_operator_for_onnx_runtime_is_built_by(
    name: str, mark: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not all(map(shutil.which, name.split())):
        reason = f"{name} is not installed (apt-get install clang libomp-dev ccache)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("SASA_BENCH_ISA", "portable")
    monkeypatch.setenv("CCACHE_DIR", str(folder / "ccache"))
    published = onnx_fused._library
    monkeypatch.setattr(onnx_fused, "_library", lambda: quick(published()))
    onnx_fused.library.cache_clear()
    try:
        agree("onnx_fused", Case(channels=8, heads=2, batch=2, kernel_size=5, resolution="4x7"))
        built = Path(onnx_fused.library())
    finally:
        onnx_fused.library.cache_clear()
    assert folder in built.parents
    assert mark in built.read_bytes()
    assert (folder / "ccache").exists() == name.startswith("ccache")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("isa", ATTENTION_BUILDS)
def test_clang_accepts_the_kernels(isa: str) -> None:
    flags = ["-std=c++20", "-fsyntax-only", "-Wno-ignored-attributes", "-DSASA_WIDEST=8"]
    flags += [f"-DSASA_ISA={isa}", *_native.ISAS[isa][0]]
    for kind in ("forward", "backward"):
        subprocess.run(["clang++", *flags, str(CSRC / f"{kind}.cpp")], check=True, timeout=120)


@needs_compiler
def test_what_a_library_is_made_of_is_in_its_name(library: Library, folder: Path) -> None:
    first = library.build()
    (folder / "seven.h").write_text("#define SEVEN 8\n")
    assert not library.is_built()
    assert call(library.build()) == 8
    assert first.exists()
    others = [
        Library("seven", library.source, library.headers, flags=("-DX",)),
        Library("seven", library.source, library.headers, versions=("2.13",)),
    ]
    assert len({library.path, first, *(other.path for other in others)}) == 4


def test_without_a_compiler_the_sentence_names_the_command(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for named in ("", "no-such-compiler", "ccache no-such-compiler"):
        monkeypatch.setenv("CXX", named)
        reason = library.missing()
        assert reason is not None
        assert reason == _native.missing_compiler() == _native.describe_compiler()
        assert "apt-get install g++" in reason
        assert named in reason
        with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
            library.build()


@needs_compiler
@pytest.mark.parametrize(
    ("command", "said"),
    [('"g++', "No closing quotation"), ("true", "true wrote no library: set CXX to a C\\+\\+ comp")],
)
def test_a_command_that_is_no_compiler_is_named(
    command: str, said: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(RuntimeError, match=said):
        library.build()
    assert command.strip('"') in _native.describe_compiler()


def test_a_built_library_needs_no_compiler(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.build()
    monkeypatch.setenv("PATH", "")
    assert library.missing() is None
    assert call(library.build()) == 7


@needs_compiler
def test_what_the_compiler_objects_to_is_one_line(library: Library) -> None:
    library.source.write_text("int main() { return seven; }\n")
    with pytest.raises(RuntimeError, match=r"cannot compile seven\.cpp: .*error.*seven") as caught:
        library.build()
    assert "\n" not in str(caught.value)
    assert not library.is_built()
    assert list(library.path.parent.glob("*.part")) == []


@needs_compiler
def test_a_library_from_another_system_is_compiled_again(library: Library, folder: Path) -> None:
    """Built where a newer library was: the linker refuses it here, as it refuses one built on a newer glibc."""
    (folder / "other.cpp").write_text('extern "C" int other() { return 1; }')
    compiler = _native.compiler()
    gone = folder / "libgone.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", gone, folder / "other.cpp"], check=True)
    library.path.parent.mkdir(parents=True)
    built = [*compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", library.path, library.source, gone]
    subprocess.run(built, check=True)
    gone.unlink()
    assert library.is_built()
    assert call(library.build()) == 7


def test_a_library_from_another_system_without_a_compiler_says_both(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.path.parent.mkdir(parents=True)
    library.path.write_bytes(b"not a library")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"does not load here .*no C\+\+ compiler"):
        library.build()


@needs_compiler
def test_a_complete_cache_may_be_read_only(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.build()
    for path in library.path.parent.glob("*.lock"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in library.path.parent.parent.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert library.missing() is None
    assert call(library.build()) == 7
    assert {path: path.stat().st_mtime_ns for path in library.path.parent.parent.rglob("*")} == before


@needs_compiler
def test_an_empty_cache_that_cannot_be_written_to_names_the_variable(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("SASA_BENCH_CACHE", str(folder / "file"))
    assert "SASA_BENCH_CACHE" in (library.missing() or "")
    with pytest.raises(RuntimeError, match="set SASA_BENCH_CACHE to a folder"):
        library.build()
    # A file system that refuses although the permissions do not say so.
    monkeypatch.setattr(_native, "_unwritable", lambda: None)
    with pytest.raises(RuntimeError, match="set SASA_BENCH_CACHE to a folder"):
        library.build()


@needs_compiler
def test_builders_at_once_compile_once(library: Library, counting: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sasa_bench.impls._native import Library\n"
        f"Library('seven', Path({str(library.source)!r}), (Path({str(library.headers[0])!r}),)).build()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    threads = [threading.Thread(target=library.build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert counting.read_text().count("called") == 1


@needs_compiler
def test_a_killed_compiler_leaves_nothing_behind(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(script(folder / "dies", 'for last; do :; done; echo half > "$last"; kill -9 $$')))
    with pytest.raises(RuntimeError, match="exit status -9"):
        library.build()
    assert not library.is_built()
    assert list(library.path.parent.glob("*.part")) == []


@pytest.mark.parametrize(
    ("vendor", "family", "model", "chosen"),
    [
        ("AuthenticAMD", 25, 0x61, "avx512"),  # Zen 4
        ("AuthenticAMD", 26, 0x44, "avx512_wide"),  # Zen 5
        ("GenuineIntel", 6, 0x55, "avx512_wide"),  # Skylake and Cascade Lake, servers
        ("GenuineIntel", 6, 0x6A, "avx512_wide"),  # Ice Lake, servers
        ("GenuineIntel", 6, 0x8C, "avx512"),  # Tiger Lake
        ("", 0, 0, "avx512"),
    ],
)
def test_vectors_of_512_bits_are_chosen_for_processors_with_two_units(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: int, model: int, chosen: str
) -> None:
    monkeypatch.delenv("SASA_BENCH_ISA", raising=False)
    monkeypatch.setattr(_native, "cpu_flags", lambda: frozenset(_native.AVX512))
    monkeypatch.setattr(_native, "_processor", lambda: (vendor, family, model))
    assert _native.chosen_isa() == chosen
    monkeypatch.setenv("SASA_BENCH_ISA", "avx512_wide")
    assert _native.chosen_isa() == "avx512_wide"
