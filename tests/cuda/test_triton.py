"""The Triton kernels: in the interpreter against float64, as an implementation, and their arguments."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sasa_bench.case import Case
from sasa_bench.impls import triton
from sasa_bench.impls.triton import launch

HERE = Path(__file__).parent


class Launched:
    """Stands for the module of kernels and keeps the compile-time arguments of each launch of the forward."""

    def __init__(self) -> None:
        self.constants = []
        self.forward = {(1, 1): lambda *arguments, **named: self.constants.append(named)}


NEEDS_TRITON = "triton is not installed: pip install 'sasa-bench[triton]'"


@pytest.mark.slow
def test_values_gradients_and_planted_bugs_in_the_interpreter():
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    folder = HERE / "interpreted"
    places = (HERE, folder, HERE.parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, places), *([inherited] if inherited else [])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    checks = [*command, "-o", "addopts=", str(folder / "triton_checks.py")]
    made = subprocess.run(checks, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "need --device cuda"),
        ({"dtype": "float32"}, "give dtype = one of .*float16"),
        ({"dtype": "tf32"}, None),
        ({"channels": 256, "heads": 1}, "256 channels per head are more than the 128"),
        ({"kernel_size": 123}, "more than the 121"),
        ({}, None),
    ],
)
def test_what_is_not_covered_has_a_reason(change, reason):
    found = triton.supports(Case(**({"device": "cuda", "dtype": "float16"} | change)))
    assert found is None if reason is None else re.search(reason, found)


@pytest.fixture
def matmul():
    """torch's switches of products on CUDA, as they were afterwards."""
    switches = torch.backends.cuda.matmul
    before = switches.allow_tf32
    yield switches
    switches.allow_tf32 = before


def test_float32_is_rounded_to_tf32_only_where_torch_allows_it(matmul):
    kernels = Launched()
    for allowed in (False, True):
        matmul.allow_tf32 = allowed
        for dtype in launch.DTYPES:
            q = torch.zeros(1, 8, 2, 2, dtype=dtype)
            launch.run_forward(launch.Launcher(kernels), q, q, q, None, None, q, torch.zeros(1, 1, 2, 2), 3, 1, False)
    assert [found["PRECISION"] for found in kernels.constants] == [*["ieee"] * 5, "tf32"]
    assert launch.allows_tf32()


def test_without_triton_it_says_how_to_install_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert triton.missing() == "triton is not installed: pip install 'sasa-bench[triton]'."


@pytest.mark.parametrize(
    ("version", "refused"), [("3.4.0", True), ("3.5.1", False), ("3.10.0", False), ("main", False)]
)
def test_a_triton_that_cannot_compile_the_kernels_is_named(version, refused, monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(triton.metadata, "version", lambda name: version)
    said = triton.missing() or ""
    assert (said == "triton 3.4 does not compile the kernels: pip install 'triton>=3.5'.") == refused


def test_maps_whose_channels_lie_together_are_not_copied():
    qkv = torch.randn(2, 3 * 8, 4, 5).contiguous(memory_format=torch.channels_last)
    thirds = qkv.chunk(3, 1)
    kept = launch.pixel_major(*thirds)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in thirds]
    planar = torch.randn(2, 8, 4, 5)
    (copied,) = launch.pixel_major(planar)
    assert launch.strides(copied) == (8 * 20, 8)
    assert torch.equal(copied, planar)


def test_the_projection_of_the_layer_is_pixel_major():
    x, w_qkv = torch.randn(2, 6, 3, 5), torch.randn(18, 6)
    expected = torch.nn.functional.conv2d(x, w_qkv[:, :, None, None])
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            found = triton.project(given, w_qkv)
            assert all(launch.is_pixel_major(t) for t in found.chunk(3, 1))
            torch.testing.assert_close(found, expected)
    assert launch.is_pixel_major(triton.project(x, w_qkv.requires_grad_()))


def test_shapes_and_layout_are_known_without_a_device():
    with FakeTensorMode():
        q = torch.empty(2, 12, 5, 6, device="cuda", dtype=torch.bfloat16)
        y, log2_sum = triton.OPERATORS.forward(q, q, q, None, None, 3, 4, True)
        assert (y.shape, y.dtype, y.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (log2_sum.shape, log2_sum.dtype) == ((2, 4, 5, 6), torch.float32)
