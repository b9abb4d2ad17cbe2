"""The environment variables: what workers get, what files record, what is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sasa_bench
from sasa_bench.results import environment
from sasa_bench.results.environment import UnfitEnvironmentError, recorded, require_free_threads, worker_environment


def test_what_changes_measurements_is_recorded_and_what_only_says_where_is_not() -> None:
    given = {
        "LD_PRELOAD": "libjemalloc.so",
        "OMP_NUM_THREADS": "1",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "SASA_BENCH_ISA": "portable",
        "CXX": "clang++",
        "MALLOC_ARENA_MAX": "1\x1b",
    }
    others = {"HOME": "/root", "CUDA_HOME": "/usr", "TORCH_EXTENSIONS_DIR": "/x", "CXXFLAGS": "-O1", "SECRET": "x"}
    assert recorded(given | others) == given | {"MALLOC_ARENA_MAX": "1\\x1b"}


@pytest.mark.parametrize(("glibc", "added"), [((2, 31), {"MALLOC_MMAP_MAX_": "0"}), ((2, 35), {}), ((2, 41), {})])
def test_an_old_glibc_keeps_its_heap_by_another_setting(glibc: tuple[int, int], added: dict[str, str]) -> None:
    assert worker_environment(glibc) == environment.WORKER_ENVIRONMENT | added


@pytest.mark.parametrize(("answers", "found"), [([1], "threshold"), ([0, 1], "without mmap"), ([0, 0], "")])
def test_a_worker_sees_that_its_heap_is_kept(answers: list[int], found: str) -> None:
    from sasa_bench.timing.child import M_MMAP_MAX, M_MMAP_THRESHOLD, keep_heap

    asked: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append((parameter, value))
        return answers[len(asked) - 1]

    assert keep_heap(mallopt) == found
    assert asked == [(M_MMAP_THRESHOLD, 1 << 30), (M_MMAP_MAX, 0)][: len(answers)]


BUFFERS = """
import ctypes, mmap, os, sys
import resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 << 20
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    address = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(address, 1, size)
    libc.free(ctypes.c_void_p(address))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touched()
print(max(touched() for _ in range(3)))
"""


@pytest.mark.parametrize("glibc", [(2, 31), (2, 40)])
@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc's allocator")
def test_large_buffers_are_not_mapped_again_in_each_call(glibc: tuple[int, int]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUFFERS], env=worker_environment(glibc), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1000


@pytest.mark.parametrize("value", ["true", "TRUE", "close", "spread"])
def test_binding_is_refused_by_name(value: str) -> None:
    with pytest.raises(UnfitEnvironmentError, match=f"OMP_PROC_BIND={value} binds.*unset OMP_PROC_BIND"):
        require_free_threads({"OMP_PROC_BIND": value})


@pytest.mark.parametrize("name", ["OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"])
def test_places_bind_as_well(name: str) -> None:
    with pytest.raises(UnfitEnvironmentError, match=f"{name}=0-3 binds.*unset {name}"):
        require_free_threads({name: "0-3"})


@pytest.mark.parametrize("given", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for_are_refused_by_name(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    ((name, value),) = given.items()
    with pytest.raises(UnfitEnvironmentError, match=f"{name}={value} gives a process .*unset {name}"):
        require_free_threads(given)


@pytest.mark.parametrize(
    "given",
    [
        {"OMP_THREAD_LIMIT": "4096", "OMP_DYNAMIC": "false"},
        {},
        {"OMP_PROC_BIND": "false", "KMP_AFFINITY": "disabled"},
        {"OMP_PROC_BIND": "FALSE", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0-3"},
        {"KMP_AFFINITY": "verbose,none", "OMP_PLACES": ""},
    ],
)
def test_no_binding_is_no_matter(given: dict[str, str]) -> None:
    require_free_threads(given)


def test_every_variable_that_the_code_reads_is_in_the_table() -> None:
    standard = {"PATH", "XDG_CACHE_HOME", "HOME", "CI_JOB_URL", "CI"}
    known = {*environment.READ, *environment.SET, *environment.RECORDED, *environment.BINDING} | standard
    read = set()
    for path in Path(sasa_bench.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                name = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                name = node.slice
            else:
                continue
            if isinstance(name, ast.Constant):
                read.add(name.value)
    assert {"CXX", "SASA_BENCH_ISA"} <= read
    assert read <= known
