"""Checks a GPU in at most nine minutes: numerics, sanitizer, times and choices. `make gpu-check`; it resumes.

python tests/cuda/gpu_check.py [FOLDER]                  by default reports/gpu-check
python tests/cuda/gpu_check.py --step compile sm_90      compiles the kernels of cuda ahead, without a GPU

Each step is a process of its own with a time limit, so that a hang or a broken device costs one step. A step that
succeeded on this device, with these kernels and this torch, is not run again. What a person would send back is packed
into FOLDER.tar.gz.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from sasa_bench.results.record import Record

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "pytest": "pytest",
    "cuda.bindings": "cuda-bindings",
    "cuda.core": "cuda-core",
}
"""Modules that the steps import, besides what these bring -> the packages they come with."""
BUDGET_S = 0.1
"""Of samples, for a row of the times."""
UNMEASURED = {"SASA_BENCH_TUNE": "0"}
"""A step that checks values takes the first candidate of each kernel: a search would compile all of them."""
MEASURED_WITH = ("triton", "cuda-core", "cuda-bindings", "numpy", "nvidia-ml-py")
"""Packages whose versions, besides torch's, decide what the steps find."""
OPTIONAL = " is not installed"
"""What a step says that needs a program which is not there; the check may succeed without it."""
SEPARATE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Each tensor is an allocation of its own, so that the sanitizer sees what is written beside it."""


@dataclass(frozen=True)
class Step:
    """One part of the check: `command` runs for at most `limit_s` seconds; its output goes to NAME.txt.

    junit is the file of a step that runs tests, of which some must pass.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    junit: Path | None = None


def times_file(folder: Path, of: str) -> Path:
    """The results file of the times of `of`: a run refuses that of other code."""
    return folder / f"times-{of}.jsonl"


def steps(folder: Path, of: str = "") -> list[Step]:
    """The steps, most telling first."""
    python, here = sys.executable, str(Path(__file__))
    tests = ("-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider")
    # Errors of calls to the driver, of which cuda-core makes some on purpose, are no errors of the kernels.
    quiet = ("--error-exitcode", "9", "--report-api-errors", "no", "--launch-timeout", "0")
    sanitizer = ("compute-sanitizer", *quiet, python, here, "--step", "sanitized")

    def numerics(name: str, limit_s: int) -> Step:
        junit = folder / f"numerics-{name}.xml"
        file = str(Path(__file__).with_name(f"test_{name}_gpu.py"))
        return Step(f"numerics-{name}", limit_s, (python, *tests, file, f"--junitxml={junit}"), UNMEASURED, junit)

    return [
        Step("versions", 30, (python, here, "--step", "versions")),
        Step("compile", 100, (python, here, "--step", "compile")),
        numerics("cuda", 60),
        numerics("triton", 50),
        Step("times", 200, (python, here, "--step", "times", str(times_file(folder, of)))),
        Step("choices", 30, (python, here, "--step", "choices", str(folder))),
        Step("sanitizer", 70, sanitizer, UNMEASURED | SEPARATE),
    ]


ASK = """
import torch
print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")
print(torch.__version__, torch._C._cuda_getDriverVersion() if torch.version.cuda else "")
"""


def ask_torch() -> tuple[str, str]:
    """Name of the device, "" for none, and versions of torch and the driver, by a process that may hang or fail."""
    try:
        said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return "", ""
    device, _, versions = said.partition("\n")
    return device, versions.strip()


def version_of(package: str) -> str:
    """Its version, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def subject() -> str:
    """What is checked, as a digest: the device, driver and libraries, and the kernels with their tests."""
    known = [*ask_torch(), *map(version_of, MEASURED_WITH)]
    whole = hashlib.sha256("\0".join(known).encode())
    for folder in (ROOT / "sasa_bench", ROOT / "tests" / "cuda"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".toml")):
            whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def none_passed(junit: Path) -> bool:
    """Whether no test of a JUnit file ran to its end: all were skipped, or the file is not there."""
    try:
        suites = ElementTree.parse(junit).getroot().iter("testsuite")
        counts = [
            {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")} for suite in suites
        ]
    except (OSError, ElementTree.ParseError):
        return True
    return not sum(each["tests"] - each["skipped"] - each["failures"] - each["errors"] for each in counts)


def run(folder: Path, wanted: Sequence[Step], of: str = "") -> list[dict[str, Any]]:
    """Runs the steps that have not succeeded yet on `of`; status and seconds of each are in FOLDER/steps.json."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "steps.json"
    known = {step["name"]: step for step in json.loads(record.read_text())} if record.exists() else {}
    for step in wanted:
        before = known.get(step.name, {})
        if before.get("status") == "ok" and before.get("of", "") == of:
            continue
        began = time.monotonic()
        with open(folder / f"{step.name}.txt", "w") as output:
            try:
                running = subprocess.Popen(
                    step.command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
                    start_new_session=True,
                )
            except FileNotFoundError:
                status = f"{step.command[0]}{OPTIONAL}"
            else:
                status = ended(running, step)
        seconds = round(time.monotonic() - began, 1)
        known[step.name] = {"name": step.name, "status": status, "seconds": seconds, "of": of}
        record.write_text(json.dumps(list(known.values()), indent=1))
        print(f"{step.name}: {status}, {seconds} s", flush=True)
    return [known[step.name] for step in wanted]


def keep_tunables(folder: Path) -> None:
    """Copies what the searches chose, without which the times cannot be read."""
    from sasa_bench.results.cache import cache_directory

    for file in cache_directory().glob("tunables-*.json"):
        shutil.copy(file, folder)


def keep_table(folder: Path, measured: Path) -> str:
    """The table of what was measured, to the last row where the step was stopped; it is kept in table.txt."""
    from sasa_bench.case import UserError
    from sasa_bench.results.file import read

    try:
        said = table(read([measured]).rows)
    except UserError as error:
        said = str(error)
    (folder / "table.txt").write_text(said + "\n")
    return said


def ended(running: subprocess.Popen[bytes], step: Step) -> str:
    """How a step ended; at its limit, or where this is stopped, it is killed with all processes that it started."""
    try:
        code = running.wait(step.limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {step.limit_s} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    if code:
        return f"exit status {code}"
    return "no test ran" if step.junit and none_passed(step.junit) else "ok"


def pack(folder: Path) -> Path:
    """FOLDER.tar.gz with everything that the steps wrote."""
    path = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def versions() -> None:
    """Prints the device and the versions of what is needed; exit status 1 where something is missing."""
    lacking = {}
    for name, package in NEEDED.items():
        try:
            import_module(name)
        except ImportError as error:
            lacking[package] = f"{name}: {error}"
            continue
        print(package, version_of(package) or "of another distribution")
    if lacking:
        names = " ".join(f"'{name}=={of_torch()}.*'" if name == "cuda-bindings" else name for name in lacking)
        remedy = f"pip install --target carried {names}; then PYTHONPATH=carried make gpu-check"
        sys.exit("\n".join(["missing:", *lacking.values(), f"here, or elsewhere and copied: {remedy}"]))
    import torch

    print("CUDA of torch", torch.version.cuda)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
    from sasa_bench import impls
    from sasa_bench.impls._nvrtc import missing

    for name in ("cuda", "triton"):
        print(name, impls.get(name).missing() or "can run")
    if reason := missing():
        sys.exit(f"missing: {reason}")


def of_torch() -> str:
    """The major version of CUDA that torch was built for, which the bindings have to match."""
    try:
        import torch
    except ImportError:
        return "13"
    return str(torch.version.cuda or "13").partition(".")[0]


def kernels_wanted() -> list[tuple[str, str]]:
    """(source, template instance) of every kernel of `cuda` that the other steps launch."""
    from dense_reference import Problem
    from test_cuda_numerics import DEFAULTS

    from sasa_bench.impls.cuda import kernels, kernels_of
    from sasa_bench.suite import load

    found = []
    for problem in (*DEFAULTS, Problem()):
        function = kernels.Function(
            problem.dtype, problem.kernel_size, problem.head_width, problem.position, problem.zero_border
        )
        for kernel in ("forward", "backward_queries", "backward_keys"):
            first = kernels.candidates(kernel, function, problem.height, problem.width)[0]
            found.append((kernels.source(), kernels.expression(kernel, function, first)))
        if problem.position:
            last = kernels.last_sum(problem.dtype, problem.kernel_size, problem.head_width)
            found.append((kernels.source(), last))
    suite = load(Path(__file__).with_suffix(".toml"), {"device": ["cuda"]})
    return found + [kernel for case in suite.cases for kernel in kernels_of(case)]


def compile_all(arch: str = "") -> None:
    """Compiles them, as many at a time as there are processors, into the cache of cubins.

    For the GPU at hand, with Triton's kernels after that; or for `arch`, such as sm_90, without a GPU.
    """
    from sasa_bench.impls import _nvrtc as nvrtc

    here = not arch
    if here:
        import torch

        arch = nvrtc.runtime(torch.device("cuda", 0)).arch
    processors = os.cpu_count() or 1
    count, failures = nvrtc.prebuild(kernels_wanted(), arch, processors)
    print("\n".join([f"{count - len(failures)} of {count} kernels of cuda for {arch}", *failures]), flush=True)
    if here:
        problems = triton_problems()
        with ProcessPoolExecutor(min(16, processors), multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(compile_triton, problem): problem for problem in problems}
            for done in as_completed(running):
                if failure := done.result():
                    failures.append(failure)
                print(f"triton, {running[done]}: {failure or 'ok'}", flush=True)
    if failures:
        sys.exit(f"{len(failures)} kernels or problems do not compile")


@dataclass(frozen=True)
class Compiled:
    """A problem that another step runs with `triton`, in `dtype`.

    search  its forward pass with every candidate of the search; else both passes with the first
    tf32    whether torch allows tf32
    """

    problem: Any
    dtype: Any
    search: bool = False
    tf32: bool = False


def triton_problems() -> list[Compiled]:
    """What the other steps run with `triton`, the longest first."""
    import torch
    from dense_reference import Problem
    from test_triton_gpu import PROBLEMS, of_float32

    from sasa_bench.suite import load

    cases = load(Path(__file__).with_suffix(".toml"), {"device": ["cuda"]}).cases
    sizes = {
        (case.dtype, case.head_dim, case.height, case.kernel_size): case for case in cases if case.dtype != "float32"
    }
    timed = [
        Problem(
            dtype=getattr(torch, case.dtype),
            batch=2,
            heads=case.heads,
            head_width=case.head_dim,
            height=case.height,
            width=case.width,
            kernel_size=case.kernel_size,
        )
        for case in sizes.values()
    ]
    return [
        *(Compiled(problem, problem.dtype, search=True) for problem in timed),
        *(Compiled(of_float32(allowed), torch.float32, tf32=allowed) for allowed in (True, False)),
        *(Compiled(problem, problem.dtype) for problem in PROBLEMS),
    ]


def compile_triton(item: Compiled) -> str:
    """Runs one problem once, and Triton keeps what it compiles. Why it failed, or ""."""
    import torch
    from test_triton_gpu import attended, on_device

    from sasa_bench.impls import _tuning

    def once(run: Any) -> float:
        run()
        return 1.0

    _tuning.replay_seconds = once
    _tuning.TuningStore.add = lambda *given: None  # type: ignore[method-assign]
    os.environ["SASA_BENCH_TUNE"] = "1" if item.search else "0"
    torch.backends.cuda.matmul.allow_tf32 = item.tf32
    try:
        if item.search:
            with torch.no_grad():
                attended(item.problem, item.dtype)
        else:
            on_device(item.problem, item.dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def times(out: str, suite: str = "", device: str = "cuda") -> None:
    """Measures the suite into a results file, as `sasa-bench run --resume` does, whose command line needs packages.

    Exit status 1 where a row is wrong or failed, or an implementation has no time at all.
    """
    from sasa_bench.results.file import read
    from sasa_bench.suite import load
    from sasa_bench.sweep.plan import open_results
    from sasa_bench.sweep.run import run as measure
    from sasa_bench.timing import probe
    from sasa_bench.timing.settings import Settings

    path, machine = Path(out), probe.detect()
    if device == "cuda" and not machine.gpu:
        machine = replace(machine, gpu=ask_torch()[0])
    wanted = load(Path(suite) if suite else Path(__file__).with_suffix(".toml"), {"device": [device]})
    known = open_results(path, True, machine)
    if known:
        fine = {row.impl for row in known.rows if row.status == "ok"}
        known.drop([row for row in known.rows if row.status not in ("ok", "skipped") or row.impl not in fine])
    measure([wanted], (), path, known=known, machine=machine, settings=Settings(budget_s=BUDGET_S))
    rows = read([path]).rows
    bad = [row for row in rows if row.status not in ("ok", "skipped")]
    said = [f"{row.impl}, {row.case.describe()}: {row.status}: {row.reason}" for row in bad]
    for name in wanted.impls:
        own = [row for row in rows if row.impl == name]
        if not any(row.status == "ok" for row in own):
            said.append(f"{name} has no time in {len(own)} cases: {own[0].reason if own else 'none was measured'}")
    if said:
        sys.exit("\n".join(said))


def table(rows: Sequence[Record]) -> str:
    """A line for each case: microseconds of each implementation, and how many times the fastest convolution that is."""
    lines = ["microseconds, in brackets times the fastest convolution; `sasa-bench table` and `report` give intervals"]
    eager = False
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        convolutions = [row.median_s for row in own if row.op == "convolution" and row.status == "ok"]
        cells = []
        for row in own:
            ratio = f" ({row.median_s / min(convolutions):.2f})" if convolutions else ""
            queued = row.status == "ok" and case.device == "cuda" and not row.extra.get("replayed")
            eager = eager or queued
            figure = f"{row.median_s * 1e6:.1f}{'*' if queued else ''}{ratio}" if row.status == "ok" else row.status
            cells.append(f"{row.impl} {figure}")
        lines.append(f"{case.describe()}: {', '.join(cells)}")
    if eager:
        lines.append("* calls queued by the host, since they could not be replayed as a graph: no ratio of kernels")
        reasons = {f"{row.impl}: {reason}" for row in rows if (reason := row.extra.get("not_replayed"))}
        lines += sorted(reasons)
    return "\n".join(lines)


def choices(runtime: Any, device: str, seconds: Any, problem: Any) -> list[dict[str, Any]]:
    """Of one problem's forward pass: each candidate with its seconds, and whether the search chose it."""
    import torch

    from sasa_bench.impls.cuda import kernels, launch

    (q, k, v, rel_row, rel_col), _ = problem.inputs(device)
    function = kernels.Function(
        problem.dtype, problem.kernel_size, problem.head_width, problem.position, problem.zero_border
    )
    found = kernels.candidates("forward", function, problem.height, problem.width)
    y, log2_sum = torch.empty_like(q), q.new_empty((problem.batch, problem.heads, *q.shape[2:]), dtype=torch.float32)
    arguments = launch.forward_arguments(q, k, v, rel_row, rel_col, y, log2_sum, problem.heads)

    def run(tunables: kernels.Tunables) -> None:
        plan = launch.plan_for("forward", function, q.shape, problem.heads, tunables)
        runtime.launch(kernels.source(), plan.expression, plan.grid, plan.block, arguments)

    chosen = runtime.choose(kernels.source(), f"gpu-check {problem}", found, run)
    rows = []
    for tunables in found:
        try:
            measured = {"seconds": seconds(lambda t=tunables: run(t))}
        except Exception as error:  # the search goes on without this one too
            measured = {"error": str(error)}
        rows.append({**vars(tunables), **measured, "chosen": tunables == chosen})
    return rows


def sanitized() -> None:
    """Runs the kernels on three problems; compute-sanitizer watches."""
    import torch
    from test_cuda_gpu import on_device
    from test_cuda_numerics import DEFAULTS

    for problem in (DEFAULTS[0], DEFAULTS[len(DEFAULTS) // 2], DEFAULTS[-1]):
        on_device(problem)
    torch.cuda.synchronize()


def check(folder: Path) -> None:
    """Runs all steps, and packs what they wrote however this ends."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # which nohup asks for
            signal.signal(ending, lambda number, _: sys.exit(128 + number))  # so that the step that runs is ended too
    keep_caches(folder)
    of = subject()
    first, *others = steps(folder, of)
    found = run(folder, [first], of)
    said = (folder / "versions.txt").read_text()
    if found[0]["status"] != "ok" and "missing:" in said:  # the others would fail for the same reason
        sys.exit(said)
    try:
        found += run(folder, others, of)
    finally:
        said = keep_table(folder, times_file(folder, of))
        keep_tunables(folder)
        archive = pack(folder)
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(f"{said}\nsend back {archive}", flush=True)
    sys.exit(any(step["status"] != "ok" and not step["status"].endswith(OPTIONAL) for step in found))


def keep_caches(folder: Path) -> None:
    """Where the caches of compiled kernels cannot be written, as in a container without a home, they lie beside."""
    from sasa_bench.results.cache import cache_directory

    triton = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    for name, cache in (("SASA_BENCH_CACHE", cache_directory()), ("TRITON_CACHE_DIR", triton)):
        existing = next(each for each in (cache, *cache.absolute().parents) if os.path.exists(each))
        if not os.access(existing, os.W_OK):
            os.environ[name] = str(folder.with_name(f"{folder.name}-cache") / name.lower())


def main(arguments: Sequence[str]) -> None:
    """Runs one step, or all of them."""
    if arguments[:1] != ["--step"]:
        check(Path(arguments[0] if arguments else ROOT / "reports" / "gpu-check").absolute())
    if arguments[1] == "choices":
        import torch
        from dense_reference import Problem

        from sasa_bench.impls import _nvrtc as nvrtc
        from sasa_bench.impls._tuning import replay_seconds

        problem = Problem(dtype=torch.float16, batch=64, heads=8, head_width=16, height=28, width=28)
        rows = choices(nvrtc.runtime(torch.device("cuda", 0)), "cuda", replay_seconds, problem)
        (Path(arguments[2]) / "choices.json").write_text(json.dumps(rows, indent=1))
    else:
        parts = {"versions": versions, "compile": compile_all, "sanitized": sanitized, "times": times}
        parts[arguments[1]](*arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
