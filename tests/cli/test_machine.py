"""What a machine lacks and what doctor says about it, as a user types the commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import QUICK, sasa_bench
from fake_nvml import FakeNvml

from sasa_bench.impls import names
from sasa_bench.results.file import read


def test_cuda_asked_for_where_there_is_none_is_one_sentence(suite: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    ran = sasa_bench("run", suite, "--device", "cuda")
    assert ran.returncode == 1
    assert "NVIDIA GPU" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("built_for", "words"),
    [(None, "is a build without CUDA: install a CUDA build of torch"), ("13.0", "nvidia-smi must list the device")],
)
@pytest.mark.parametrize("verb", ["run", "profile"])
def test_what_cuda_lacks_is_one_sentence(
    verb: str, built_for: str | None, words: str, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = ["--impl", "unfold", "-c", "kernel_size=3"]
    ran = sasa_bench(verb, suite, *case, "--device", "cuda", "--out", suite.parent / "never")
    assert ran.returncode == 1
    assert words in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (suite.parent / "never").exists()


def test_make_bench_gpu_ends_where_the_command_does(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    verb = f'#!/bin/sh\necho "$1" >> {log}\nexec {sys.executable} -m sasa_bench "$@"\n'
    for name, script in (("sasa-bench", verb), ("pip", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ready").touch()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["make", "bench-gpu", f"VENV={tmp_path}", f"RESULTS={tmp_path}/a.jsonl"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert log.read_text() == "prebuild\n"
    assert not (tmp_path / "a.jsonl").exists()


def test_without_nvml_a_gpu_run_says_what_is_absent_and_goes_on(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sasa_bench.impls import _nvrtc as nvrtc
    from sasa_bench.timing import nvml

    monkeypatch.setattr(nvrtc, "no_device", lambda: None)  # in this process, not in the worker
    monkeypatch.setattr(nvml, "_pynvml", lambda: FakeNvml(unsupported={"nvmlInit"}))
    ran = sasa_bench("run", suite, "--device", "cuda", "--energy", "--out", tmp_path / "a.jsonl", *QUICK)
    assert ran.returncode == 0
    assert "throttled samples are kept: NVML reports nothing" in ran.stderr
    assert len(read([tmp_path / "a.jsonl"]).rows) == 6


def test_energy_is_read_on_a_gpu_only(suite: Path) -> None:
    ran = sasa_bench("run", suite, "--energy")
    assert (ran.returncode, "--device cuda" in ran.stderr) == (1, True)


def test_doctor_says_what_this_machine_can_run() -> None:
    ran = sasa_bench("doctor")
    assert ran.returncode == 0
    assert "processor" in ran.stdout
    assert "compiler" in ran.stdout
    assert "NVML" in ran.stdout
    for name in names():
        assert name in ran.stdout


def test_doctor_shows_builds_and_what_was_tuned_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sasa_bench.impls._nvrtc import TuningStore

    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    TuningStore("Some GPU sm_90").add("forward float32 k=7", {"pixels": 2, "lanes": 1}, 12.5e-6)
    said = sasa_bench("doctor").stdout
    assert "Some-GPU-sm-90: forward float32 k=7: lanes=1 pixels=2 (12.5 us)" in said
    assert f"cached cubins: 0 (0 KiB) in {tmp_path}" in said
    assert re.search(r"build portable: (compiled|compiled at first use)", said)


def test_doctor_goes_on_where_an_implementation_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASA_BENCH_ISA", "abacus")
    ran = sasa_bench("doctor")
    assert ran.returncode == 0
    assert "SASA_BENCH_ISA=abacus is not a build; choose one of" in ran.stdout
    assert all(name in ran.stdout for name in names())


def test_doctor_says_which_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    shown = sasa_bench("doctor").stdout
    assert "there is no C++ compiler (CXX=no-such-compiler): apt-get install g++ (or the like), or set CXX" in shown


def test_doctor_explains_itself() -> None:
    ran = sasa_bench("doctor", "--help")
    assert ran.returncode == 0
    assert "what would unlock" in ran.stdout
    assert "SASA_BENCH_CACHE" in ran.stdout


def test_doctor_checks_only_and_exits_with_3_when_something_spoils(monkeypatch: pytest.MonkeyPatch) -> None:
    from sasa_bench.cli import doctor

    monkeypatch.setattr(doctor, "busy_now", list)
    monkeypatch.setattr(doctor, "spoilers", lambda: ["turbo is on"])
    ran = sasa_bench("doctor", "--check")
    assert (ran.returncode, ran.stdout) == (3, "spoils measurements: turbo is on\n")
    monkeypatch.setattr(doctor, "spoilers", list)
    assert sasa_bench("doctor", "--check").returncode == 0
