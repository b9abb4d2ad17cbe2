"""The verb prebuild: which kernels it compiles, and who finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("cuda.core", reason="cuda-core is not installed: pip install 'sasa-bench[cuda-check]'")

import emulation

from sasa_bench.case import Case, UserError
from sasa_bench.cli import cli
from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import cuda
from sasa_bench.ops.tensors import leaves, random_tensors

CASE = Case(device="cuda", scope="core", channels=8, heads=2, kernel_size=3, resolution=5, batch=1, mode="training")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of what was compiled; a stand-in compiles at once, and the cache is empty."""
    found: list[str] = []

    def compile_cubin(source: str, expression: str, arch: str) -> nvrtc.Cubin:
        found.append(expression)
        return nvrtc.Cubin(b"\x7fELF" + arch.encode(), expression)

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    return found


@pytest.mark.parametrize("position", ["relative", "none"])
def test_a_case_names_every_kernel_that_it_launches(position: str) -> None:
    case = CASE.with_(position=position)
    tensors = leaves(random_tensors(cuda.IMPL.op, case, 0), case.with_(device="cpu"))
    inputs = [tensors.get(name) for name in ("q", "k", "v", "rel_row", "rel_col")]
    axes = (case.kernel_size, case.heads, False)
    named = {expression for _, expression in cuda.kernels_of(case)}
    for index in range(6):
        recorder = emulation.RecordingRuntime(lambda key, found, index=index: found[index % len(found)])
        y, log2_sum = emulation.run_forward(recorder, *inputs, *axes)
        emulation.run_backward(recorder, torch.ones_like(y), *inputs, y, log2_sum, *axes)
        assert recorder.expressions <= named


def test_what_it_compiles_is_found_by_every_nvrtc_of_that_major_version(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = tmp_path / "small.toml"
    suite.write_text(
        'title = "small"\nimpls = ["cuda", "conv3x3"]\n[axes]\nkernel_size = [3, 5]\n[fixed]\nchannels = 8\nheads = 2\n'
    )
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "13.0")
    done = CliRunner().invoke(
        cli, ["prebuild", str(suite), "--arch", "sm_90", "-c", "resolution=5", "-c", "mode=training"]
    )
    assert done.exit_code == 0, done.output
    assert f"{len(compiled)} kernels for sm_90" in done.output
    assert len(set(compiled)) == len(compiled) > 0
    source, expression = cuda.kernels_of(CASE.with_(kernel_size=5))[0]
    compiled.clear()
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "13.9")
    assert nvrtc.cached_cubin(source, expression, "sm_90").symbol == expression
    assert compiled == []
    nvrtc.cached_cubin(source, expression, "sm_80")
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "14.0")
    nvrtc.cached_cubin(source, expression, "sm_90")
    assert compiled == [expression] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_architecture_has_to_be_named(compiled: list[str]) -> None:
    done = CliRunner().invoke(cli, ["prebuild", "kernel_size"])
    assert done.exit_code == 2
    assert "or give --arch sm_NN, for which no GPU is needed" in " ".join(done.output.split())


def test_an_architecture_that_is_none_is_one_line(compiled: list[str]) -> None:
    done = CliRunner().invoke(cli, ["prebuild", "kernel_size", "--arch", "hopper"])
    assert done.exit_code != 0
    assert "give sm_ and a number" in done.output
    assert compiled == []


def test_a_kernel_that_does_not_compile_is_named_and_costs_no_other(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = tmp_path / "small.toml"
    suite.write_text('title = "small"\nimpls = ["cuda"]\n[axes]\nkernel_size = [3]\n[fixed]\nchannels = 8\nheads = 2\n')
    works = nvrtc.compile_cubin

    def compile_cubin(source: str, expression: str, arch: str) -> nvrtc.Cubin:
        if broken in expression:
            raise RuntimeError("error: too many registers")
        return works(source, expression, arch)

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    broken = "backward_keys<"
    command = ["prebuild", str(suite), "--arch", "sm_90", "-c", "mode=training"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "does not compile for sm_90: error: too many registers" in done.output
    assert compiled
    broken = ""
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "another"))
    assert isinstance(CliRunner().invoke(cli, command).exception, UserError)


def test_a_cache_that_cannot_be_written_costs_no_kernel(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(nvrtc, "write_atomically", refuse)
    assert nvrtc.cached_cubin("source", "forward<float>", "sm_90").symbol == "forward<float>"
    count, failures = nvrtc.prebuild([("source", "forward<float>")], "sm_90", 1)
    assert (count, failures) == (1, ["forward<float> cannot be kept: read-only"])


def test_what_nvrtc_refuses_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    if reason := nvrtc.missing_compiler():
        pytest.skip(reason)
    count, (failure,) = nvrtc.prebuild([("template <int N> __global__ void f() { nonsense }", "f<1>")], "sm_90", 1)
    assert count == 1
    assert failure.startswith("f<1> does not compile for sm_90: NVRTCError")
