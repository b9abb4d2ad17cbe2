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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "pytest": "pytest",
    "cuda.core": "cuda-core",
    "numpy": "numpy",
    "psutil": "psutil",
    "platformdirs": "platformdirs",
    "click": "click",
    "rich": "rich",
    "lazy_loader": "lazy-loader",
    "cpuinfo": "py-cpuinfo2",
    "filelock": "filelock",
    "scipy": "scipy",
    "pandas": "pandas",
    "tabulate": "tabulate",
}
"""Modules that the steps import -> the packages they come with."""
UNMEASURED = {"SASA_BENCH_TUNE": "0"}
"""A step that checks values takes the first candidate of each kernel: a search would compile all of them."""
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
    suite = str(Path(__file__).with_suffix(".toml"))
    results = str(times_file(folder, of))
    run = (
        "-m",
        "sasa_bench",
        "run",
        suite,
        "--device",
        "cuda",
        "--budget",
        "0.1",
        "--strict",
        "--out",
        results,
        "--resume",
    )
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", python, here, "--step", "sanitized")

    def numerics(name: str, limit_s: int) -> Step:
        junit = folder / f"numerics-{name}.xml"
        file = str(Path(__file__).with_name(f"test_{name}_gpu.py"))
        return Step(f"numerics-{name}", limit_s, (python, *tests, file, f"--junitxml={junit}"), UNMEASURED, junit)

    return [
        Step("versions", 40, (python, here, "--step", "versions")),
        Step("compile", 110, (python, here, "--step", "compile")),
        numerics("cuda", 60),
        numerics("triton", 50),
        Step("times", 180, (python, *run)),
        Step("choices", 30, (python, here, "--step", "choices", str(folder))),
        Step("sanitizer", 70, sanitizer, UNMEASURED | SEPARATE),
    ]


def subject() -> str:
    """What is checked: the device, torch, and the kernels with their tests, as a digest."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name(0))"
    device = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    whole = hashlib.sha256(device.encode())
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
                status = f"{step.command[0]} is not installed"
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
    from importlib import import_module, metadata

    lacking = {}
    for name, package in NEEDED.items():
        try:
            import_module(name)
        except ImportError as error:
            lacking[package] = f"{name}: {error}"
            continue
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            print(package, "of another distribution")
    if lacking:
        names = " ".join(lacking)
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
    print(f"{nvrtc.prebuild(kernels_wanted(), arch, os.cpu_count() or 1)} kernels of cuda for {arch}", flush=True)
    if here:
        problems = triton_problems()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(8, os.cpu_count() or 1), context) as pool:
            failures = [failure for failure in pool.map(compile_triton, problems) if failure]
        print("\n".join([f"{len(problems) - len(failures)} of {len(problems)} problems of triton", *failures]))
        if len(failures) == len(problems):
            sys.exit("no kernel of triton runs")


def triton_problems() -> list[Any]:
    """The problems that the other steps run with `triton`; those of the times with every candidate of the search."""
    from dense_reference import Problem
    from test_triton_gpu import PROBLEMS

    from sasa_bench.suite import load

    cases = load(Path(__file__).with_suffix(".toml"), {"device": ["cuda"]}).cases
    sizes = {
        (case.dtype, case.head_dim, case.height, case.kernel_size): case for case in cases if case.dtype != "float32"
    }
    import torch

    return [(problem, False) for problem in PROBLEMS] + [
        (
            Problem(
                dtype=getattr(torch, case.dtype),
                batch=2,
                heads=case.heads,
                head_width=case.head_dim,
                height=case.height,
                width=case.width,
                kernel_size=case.kernel_size,
            ),
            True,
        )
        for case in sizes.values()
    ]


def compile_triton(item: tuple[Any, bool]) -> str:
    """Runs one problem once, with every candidate or the first: Triton keeps what it compiles. Why it failed, or ""."""
    problem, every = item
    from test_triton_gpu import on_device

    from sasa_bench.impls import _tuning

    def once(run: Any) -> float:
        run()
        return 1.0

    _tuning.replay_seconds = once
    _tuning.TuningStore.add = lambda *given: None  # type: ignore[method-assign]
    os.environ["SASA_BENCH_TUNE"] = "1" if every else "0"
    try:
        on_device(problem, problem.dtype)
    except Exception as error:
        return f"{problem}: {error}"
    return ""


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


def main(arguments: Sequence[str]) -> None:
    """Runs one step, or all of them."""
    if arguments[:1] != ["--step"]:
        folder = Path(arguments[0] if arguments else ROOT / "reports" / "gpu-check").absolute()
        of = subject()
        first, *others = steps(folder, of)
        found = run(folder, [first], of)
        said = (folder / "versions.txt").read_text()
        if found[0]["status"] != "ok" and "missing:" in said:  # the others would fail for the same reason
            sys.exit(said)
        found += run(folder, others, of)
        if (times := times_file(folder, of)).exists():
            table = [sys.executable, "-m", "sasa_bench", "table", str(times)]
            shown = subprocess.run(table, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT).stdout
            (folder / "table.txt").write_text(shown)
            print(shown)
        keep_tunables(folder)
        print(f"send back {pack(folder)}")
        sys.exit(any(step["status"] != "ok" for step in found))
    if arguments[1] == "choices":
        import torch
        from dense_reference import Problem

        from sasa_bench.impls import _nvrtc as nvrtc
        from sasa_bench.impls._tuning import replay_seconds

        problem = Problem(dtype=torch.float16, batch=64, heads=8, head_width=16, height=28, width=28)
        rows = choices(nvrtc.runtime(torch.device("cuda", 0)), "cuda", replay_seconds, problem)
        (Path(arguments[2]) / "choices.json").write_text(json.dumps(rows, indent=1))
    else:
        {"versions": versions, "compile": compile_all, "sanitized": sanitized}[arguments[1]](*arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
