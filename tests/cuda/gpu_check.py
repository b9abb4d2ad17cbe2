"""Checks a GPU in at most nine minutes: numerics, sanitizer, times and choices. `make gpu-check`; it resumes.

python tests/cuda/gpu_check.py [FOLDER]    by default reports/gpu-check

Each step is a process of its own with a time limit, so that a hang or a broken device costs one step. A step that
succeeded on this device, with these kernels and this torch, is not run again. What a person would send back is packed
into FOLDER.tar.gz.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

NEEDED = ("torch", "triton", "pytest", "cuda.core", "numpy", "psutil", "platformdirs", "click", "rich", "lazy_loader",
          "cpuinfo", "filelock")  # fmt: skip
UNMEASURED = {"SASA_BENCH_TUNE": "0"}
"""A step that checks values takes the first candidate of each kernel: a search would compile all of them."""


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


def steps(folder: Path) -> list[Step]:
    """The steps, most telling first."""
    python, here = sys.executable, str(Path(__file__))
    numeric = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "cuda"))
    suite = str(Path(__file__).with_suffix(".toml"))
    results = str(folder / "times.jsonl")
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
    junit = folder / "numerics.xml"
    chosen = ("-k", "float64 or stream or graph", f"--junitxml={junit}")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", python, here, "--step", "sanitized")
    return [
        Step("versions", 30, (python, here, "--step", "versions")),
        Step("compile", 120, (python, here, "--step", "compile")),
        Step("numerics", 110, (python, *numeric, *chosen), UNMEASURED, junit),
        Step("times", 200, (python, *run)),
        Step("choices", 30, (python, here, "--step", "choices", str(folder))),
        Step("sanitizer", 50, sanitizer, UNMEASURED),
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
                done = subprocess.run(
                    step.command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    timeout=step.limit_s,
                    env=os.environ | dict(step.environment),
                )
                status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
                if status == "ok" and step.junit and none_passed(step.junit):
                    status = "no test ran"
            except subprocess.TimeoutExpired:
                status = f"stopped after {step.limit_s} s"
            except FileNotFoundError:
                status = f"{step.command[0]} is not installed"
        seconds = round(time.monotonic() - began, 1)
        known[step.name] = {"name": step.name, "status": status, "seconds": seconds, "of": of}
        record.write_text(json.dumps(list(known.values()), indent=1))
        print(f"{step.name}: {status}, {seconds} s", flush=True)
    return [known[step.name] for step in wanted]


def pack(folder: Path) -> Path:
    """FOLDER.tar.gz with everything that the steps wrote."""
    path = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def versions() -> None:
    """Prints the device and the versions of what is needed; exit status 1 where something is missing."""
    from importlib import import_module, metadata

    lacking = []
    for name in NEEDED:
        try:
            import_module(name)
            print(name, metadata.version(name.replace(".", "-")))
        except ImportError as error:
            lacking.append(f"{name}: {error}")
    if lacking:
        sys.exit("\n".join(["missing:", *lacking]))
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
    from test_cuda_numerics import DEFAULTS

    from sasa_bench.impls.cuda import kernels, kernels_of
    from sasa_bench.suite import load

    found = []
    for problem in DEFAULTS:
        function = kernels.Function(
            problem.dtype, problem.kernel_size, problem.head_width, problem.position, problem.zero_border
        )
        for kernel in ("forward", "backward_queries", "backward_keys"):
            first = kernels.candidates(kernel, function, problem.height, problem.width)[0]
            found.append((kernels.source(), kernels.expression(kernel, function, first)))
    suite = load(Path(__file__).with_suffix(".toml"), {"device": ["cuda"]})
    return found + [kernel for case in suite.cases for kernel in kernels_of(case)]


def compile_all() -> None:
    """Compiles them, as many at a time as there are processors, into the cache of cubins."""
    import torch

    from sasa_bench.impls import _nvrtc as nvrtc

    arch = nvrtc.runtime(torch.device("cuda", 0)).arch
    print(f"{nvrtc.prebuild(kernels_wanted(), arch, os.cpu_count() or 1)} kernels for {arch}")


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
        found = run(folder, steps(folder), subject())
        if (folder / "times.jsonl").exists():
            table = [sys.executable, "-m", "sasa_bench", "table", str(folder / "times.jsonl")]
            (folder / "table.txt").write_text(subprocess.run(table, capture_output=True, text=True, cwd=ROOT).stdout)
            print((folder / "table.txt").read_text())
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
        {"versions": versions, "compile": compile_all, "sanitized": sanitized}[arguments[1]]()


if __name__ == "__main__":
    main(sys.argv[1:])
