"""Builds of the fused kernel: which is chosen, what they are named after, their memory, and what sanitizers say."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fused_builds import ATTENTION_BUILDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasa_bench.impls import _attention, _native, fused

CSRC = Path(fused.__file__).parent / "csrc"
HERE = Path(__file__).parent
WIDEST = next(build for build in _native.ISAS if build in ATTENTION_BUILDS)
needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build with sanitizers")
pytestmark = pytest.mark.skipif(fused.missing() is not None, reason=str(fused.missing()))


@pytest.mark.parametrize("kind", _attention.HEADERS)
def test_a_build_is_named_after_every_header_that_it_includes(kind):
    included, todo = set(), [CSRC / f"{kind}.cpp"]
    while todo:
        names = re.findall(r'#include "(\w+)\.h"', todo.pop().read_text())
        todo += [CSRC / f"{name}.h" for name in set(names) - included]
        included |= set(names)
    assert included == {*_attention.SHARED_HEADERS, *_attention.HEADERS[kind]}


def test_forced_build(monkeypatch):
    for build in _native.executable_isas():
        monkeypatch.setenv("SASA_BENCH_ISA", build)
        assert _native.chosen_isa() == build
        assert fused.missing() is None
    monkeypatch.setenv("SASA_BENCH_ISA", "neon")
    with pytest.raises(ValueError, match="avx512_amx, avx512_wide, avx512_bf16, avx512, avx2, portable"):
        _native.chosen_isa()
    monkeypatch.setattr(_native, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setenv("SASA_BENCH_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"lacks; choose one of avx2, portable"):
        fused.load()
    monkeypatch.delenv("SASA_BENCH_ISA")
    assert _native.chosen_isa() == "avx2"


def test_missing_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    assert fused.missing() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in fused.missing()
    assert "apt-get install" in fused.missing()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        fused.load()
    assert not list(tmp_path.iterdir())


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from sasa_bench.impls import _attention, _native, fused
fused.load()
torch.set_num_threads(2)
ops = torch.ops.sasa_bench
tensors = [torch.randn(6, 64, 112, 112) for _ in range(3)] + [torch.randn(8, 4, 7), torch.randn(8, 4, 7)]
small = [t[:1, :, :8, :8] for t in tensors[:3]] + tensors[3:]
rest = (7, 8, False)
y, *saved = ops.fused_local_attention_forward(*small, *rest)
ops.fused_local_attention_backward(y, *small, y, *saved, *rest)
def status(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) * 1024
def high_water(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = function()
    return kept, status("VmHWM") - before
size = sum(t.nbytes for t in tensors[:3])
(y, *saved), peak = high_water(lambda: ops.fused_local_attention_forward(*tensors, *rest))
print((peak - y.nbytes) / size)
g = torch.randn_like(y)
grads, peak = high_water(lambda: ops.fused_local_attention_backward(g, *tensors, y, *saved, *rest))
print((peak - sum(t.nbytes for t in grads)) / size)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to reset VmHWM")
def test_memory_stays_under_a_quarter_of_qkv(kernel):
    script = PEAK.format(root=str(Path(fused.__file__).parents[2]))
    # Freed tensors go back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    shares = [float(line) for line in run.stdout.split()]
    assert len(shares) == 2
    assert max(shares) < 0.25, shares


SHIMS = {
    "avx512_amx": ("shim_amx", ["-DSASA_SHIM", "-DSASA_SHIM_TILES"]),
    "avx512_bf16": ("shim_bf16", ["-DSASA_SHIM"]),
}
"""Products on tiles and in pairs whose instructions are plain C++, for machines that have none."""


# What `undefined` adds to every load and store takes the compiler longer than the kernels; `make test-all` has it.
SANITIZERS = "address,bounds,shift,signed-integer-overflow,float-cast-overflow"


@pytest.fixture
def sanitizers(request: pytest.FixtureRequest) -> str:
    return "address,undefined" if request.config.getoption("--exhaustive") else SANITIZERS


def run_program(folder: Path, source: str, build: str, flags: list[str], sanitizers: str) -> bool:
    """Compile a program of this folder with the sanitizers and run it; False where this process may not."""
    program = folder / source
    command = ["g++", "-std=c++20", "-O1", "-g1", "-Wno-psabi", "-Wno-ignored-attributes", "-DSASA_SANITIZE"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-DSASA_ISA={build}", *flags]
    subprocess.run([*command, f"-I{CSRC}", str(HERE / f"{source}.cpp"), "-o", str(program)], check=True, timeout=300)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if run.returncode == 77:
        return False
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok" in run.stdout
    return True


def and_exhaustive(builds: list[str], quick: set[str]) -> list[object]:
    """The builds as parameters; those that are not `quick` are left to `make test-all`."""
    return [build if build in quick else pytest.param(build, marks=pytest.mark.exhaustive) for build in builds]


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("build", and_exhaustive([*SHIMS, "avx2", "portable"], {*SHIMS, "portable"}))
def test_products_are_right_and_clean_under_sanitizers(tmp_path, build, sanitizers):
    flags = _native.ISAS[build][0]
    if build in _native.executable_isas() and run_program(tmp_path, "sanitize_products", build, flags, sanitizers):
        return
    if build not in SHIMS:
        pytest.skip(f"this processor does not run {build}")
    name, flags = SHIMS[build]
    assert run_program(tmp_path, "sanitize_products", name, flags, sanitizers)


@needs_gcc
@pytest.mark.exhaustive
@pytest.mark.parametrize("build", SHIMS)
def test_products_are_right_without_the_instructions(tmp_path, build, sanitizers):
    name, flags = SHIMS[build]
    assert run_program(tmp_path, "sanitize_products", name, flags, sanitizers)


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("build", and_exhaustive(ATTENTION_BUILDS, {WIDEST, "portable"}))
def test_kernels_are_clean_under_sanitizers(tmp_path, build, sanitizers, request):
    widest = 64 if request.config.getoption("--exhaustive") else 8 if build == WIDEST else 0
    flags = [f"-DSASA_WIDEST={widest}", *_native.ISAS[build][0]]
    assert run_program(tmp_path, "sanitize_fused", build, flags, sanitizers)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("program", ["sanitize_fused", "sanitize_products"])
def test_kernels_are_right_on_aarch64(tmp_path, program):
    built = tmp_path / program
    command = [
        "aarch64-linux-gnu-g++",
        "-static",
        "-std=c++20",
        "-O1",
        "-Wno-psabi",
        "-DSASA_SANITIZE",
        "-DSASA_WIDEST=0",
        "-DSASA_ISA=portable",
    ]
    command += [f"-I{CSRC}", str(HERE / f"{program}.cpp"), "-o", str(built)]
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run(["qemu-aarch64", built, "5"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok" in run.stdout


TASKS = """
#include "kernel_table.h"
#include <cstdio>
#include <cstdlib>
#include <vector>
int main(int, char** given) {
  sasa::Problem p;
  p.planes = 8 * std::atoi(given[1]);
  p.height = std::atoi(given[2]);
  p.width = std::atoi(given[3]);
  const int64_t threads = std::atoi(given[4]);
  const sasa::Tasks all(p, 8, 4, threads, std::atoi(given[5]));
  const int64_t groups = p.planes / 8, share = (all.count() + threads - 1) / threads;
  std::vector<int> done(groups * p.height * p.width);
  int64_t longest = 0;
  for (int64_t first = 0; first < all.count(); first += share) {
    int64_t pixels = 0;
    for (int64_t task = first; task < std::min(all.count(), first + share); ++task)
      all.run(task, [&](const sasa::Problem&, const sasa::Band& b) {
        for (int64_t y = b.from; y < b.to; ++y)
          for (int64_t x = b.left; x < b.right; ++x, ++pixels) ++done[(b.group * p.height + y) * p.width + x];
      });
    longest = std::max(longest, pixels);
  }
  for (int times : done)
    if (times != 1) return 1;
  std::printf("%lld %f\\n", (long long)all.count(), double(done.size()) / threads / longest);
}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, float]]:
    """(images of 8 heads, height, width, threads, whether columns may be cut) -> tasks, and the share of the threads'
    time that is work, where the work of a task is its pixels and tasks are dealt as parallel.h deals them."""
    if reason := _native.missing_compiler():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks.cpp").write_text(TASKS)
    program = folder / "tasks"
    command = [*_native.compiler(), "-std=c++17", "-O1", f"-I{CSRC}", str(folder / "tasks.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)

    def ask(*given: int) -> tuple[int, float]:
        found = subprocess.run([program, *map(str, given)], capture_output=True, text=True, check=True)
        count, share = found.stdout.split()
        return int(count), float(share)

    return ask


@pytest.mark.parametrize("side", [28, 14])
@pytest.mark.parametrize("images", [1, 2])
def test_sixteen_threads_have_enough_to_do_with_one_image_or_two(
    tasks: Callable[..., tuple[int, float]], images: int, side: int
) -> None:
    count, share = tasks(images, side, side, 16, 1)
    assert count >= 14
    assert share > 0.75


@given(
    images=st.integers(1, 5), height=st.integers(1, 70), width=st.integers(1, 70), threads=st.integers(1, 64),
    free=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tasks_cover_every_pixel_once_and_cutting_columns_never_lengthens_the_work(
    tasks: Callable[..., tuple[int, float]], images: int, height: int, width: int, threads: int, free: bool
) -> None:
    _, share = tasks(images, height, width, threads, int(free))
    assert 0 < share <= 1
    if free:
        assert share >= 0.99 * tasks(images, height, width, threads, 0)[1]


PINNED = """
import os, sys, torch
from sasa_bench.impls import fused
fused.load()
before = torch.ops.sasa_bench.fused_local_attention(*[torch.ones(1, 2, 3, 3)] * 3, None, None, 3, 1, False)
os.environ["CXX"] = sys.argv[1] + " -O1"  # another compiler's libraries have paths of their own
fused.load()
assert [library.name for library in fused._of_layers()]
torch.ops.sasa_bench.fused_local_attention(*[torch.ones(1, 2, 3, 3)] * 3, None, None, 3, 1, False)
print("alive")
"""


def test_operators_that_are_loaded_stay_whatever_happens_to_their_files(tmp_path):
    """torch ends the process that registers operators of one name twice."""
    if reason := fused.missing():
        pytest.skip(reason)
    made = subprocess.run(
        [sys.executable, "-c", PINNED, _native.bare_compiler()], capture_output=True, text=True, timeout=280
    )
    assert made.stdout == "alive\n", made.stderr[-2000:]


def test_a_cache_below_a_folder_that_may_not_be_read_is_named(monkeypatch, tmp_path):
    def deny(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "locked" / "cache"))
    monkeypatch.setattr(Path, "exists", deny)
    assert not _native.Library("x", Path(__file__)).is_built()
    assert _native._unwritable() is None
    assert _native._loading_error(tmp_path / "none.so") == "there is no such file"
