"""A layer works where its input is, on fake tensors of a second GPU too: no table is made on the first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct TwoDevices final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, TwoDevices) }
"""
"""What a torch without CUDA lacks to follow fake tensors on a GPU; it must not stay in the process of a test."""

PROGRAM = """
import ctypes, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from sasa_bench import LocalAttention2d, impls
if not torch.cuda.is_available():
    ctypes.CDLL(sys.argv[1])
names = [name for name in impls.names() if (core := impls.get(name).core) is not None and core.portable]
for name in ["auto", *names]:
    for position in ("none", "absolute", "relative"):
        on = []
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            with FakeTensorMode(), torch.device(device):
                layer = LocalAttention2d(4, kernel_size=3, heads=2, impl=name, position=position, bias=True, proj=True)
                on.append(str(layer(torch.empty(1, 4, 9, 8)).device))
        print(name, position, *on)
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_layer_follows_its_input_to_a_second_gpu(tmp_path: Path) -> None:
    source, library = tmp_path / "guard.cpp", tmp_path / "guard.so"
    source.write_text(GUARD)
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-w", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(["c++", str(source), "-o", str(library), *flags], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert {name for name, *_ in lines} >= {"auto", "unfold", "blocked"}
    for name, position, *on in lines:
        assert on == ["cuda:1", "cuda:0", "cuda:1"], f"{name}, position {position}"
