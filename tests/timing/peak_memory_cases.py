"""Run in a worker's environment: six calls, their peak by arithmetic, by peak_memory and by memray, as JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import memray
import torch

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import leaves, random_tensors
from sasa_bench.timing.memory import peak_memory

torch.set_num_threads(2)
x = torch.randn(2, 64, 112, 112)
size = x.numel() * x.element_size()
case = impls.get("conv3x3_packed").computes(Case(channels=64, heads=8, resolution=112))
tensors = leaves(random_tensors(ops.get("convolution"), case, 1), case)
packed = impls.get("conv3x3_packed").build(case, tensors)

CASES = {
    "sum": (lambda: x + 1, size),
    "temporary": (lambda: (x + 1) * 2, 2 * size),
    "softmax": (lambda: x.softmax(-1), size),
    "wider": (lambda: x.double(), 2 * size),
    "copies": (lambda: torch.cat([x, x, x]), 3 * size),
    "convolution": (packed, size),
}
found = {}
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    for name, (step, exact) in CASES.items():
        step()
        measured, _ = peak_memory(step, "cpu")
        trace = Path(folder) / f"{name}.bin"
        with memray.Tracker(trace):
            step()
        found[name] = [exact, measured, memray.FileReader(trace).metadata.peak_memory]
print(json.dumps(found))
