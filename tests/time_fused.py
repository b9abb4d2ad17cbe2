"""Times the fused layer against a 3x3 convolution, interleaved in one process: the figures of docs/fused.md.

python tests/time_fused.py [forward] [training] [unfold] [--rounds N]
Set OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
MALLOC_TOP_PAD_=268435456, as a measuring process does, or page faults on fresh outputs are part of every time.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from sasa_bench.impls import fused

CASES = [(64, 56, 7), (128, 28, 7), (256, 14, 7), (512, 7, 7), (128, 28, 19)]  # channels, resolution, kernel_size
BATCH, HEADS = 2, 8


def medians(functions, rounds):
    """Median seconds of each function, and the median over rounds of its time relative to the first one's."""
    names = list(functions)
    times = {name: [] for name in names}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
    base = times[names[0]]
    return {
        name: (statistics.median(t), statistics.median(a / b for a, b in zip(t, base, strict=True)))
        for name, t in times.items()
    }


def unfold_attention(q, k, v, rel_row, rel_col, kernel_size):
    """The plain implementation: every window copied out of k and v; zero border."""
    batch, channels, height, width = q.shape
    d = channels // HEADS
    q = q.reshape(batch, HEADS, d, 1, height * width)
    k, v = (F.unfold(t, kernel_size, padding=kernel_size // 2).reshape(batch, HEADS, d, -1, height * width) for t in (k, v))
    rel = torch.cat([
        rel_row[..., :, None].expand(-1, -1, -1, kernel_size), rel_col[..., None, :].expand(-1, -1, kernel_size, -1)
    ], dim=1).flatten(2)
    weights = (q * (k + rel[None, ..., None])).sum(2, keepdim=True).softmax(3)
    return (weights * v).sum(3).reshape(batch, channels, height, width)


def train(function, leaves, g):
    torch.autograd.grad(function(*leaves), leaves, g)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    for channels, resolution, kernel_size in CASES:
        d = channels // HEADS
        case = SimpleNamespace(kernel_size=kernel_size, heads=HEADS, border="mask")
        core, layer = fused.attend(case), fused.layer(case)
        x, g, q, k, v = (torch.randn(BATCH, channels, resolution, resolution) for _ in range(5))
        w3 = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
        w = torch.randn(3 * channels, channels) / channels**0.5
        row, col = torch.randn(HEADS, d // 2, kernel_size) / d, torch.randn(HEADS, d - d // 2, kernel_size) / d

        def conv(x, w):
            return F.conv2d(x, w, padding=1)

        def project(x, w):
            return torch.bmm(w.expand(BATCH, -1, -1), x.flatten(2))

        def show(what, functions, rounds=arguments.rounds):
            line = " ".join(f"{n} {t * 1e3:.2f} ms ({r:.2f})" for n, (t, r) in medians(functions, rounds).items())  # noqa: B023
            print(f"{channels:4d} ch {resolution:2d}² k {kernel_size:2d} {what:8s} {line}", flush=True)  # noqa: B023

        if "forward" in arguments.what:
            with torch.no_grad():
                show("forward", {
                    "conv3x3": lambda: conv(x, w3),  # noqa: B023
                    "layer": lambda: layer(x, w, row, col),  # noqa: B023
                    "projections": lambda: project(x, w),  # noqa: B023
                    "core": lambda: core(q, k, v, row, col),  # noqa: B023
                })
        if "training" in arguments.what:
            leaves = [t.clone().requires_grad_() for t in (x, w, row, col)]
            conv_leaves = [t.clone().requires_grad_() for t in (x, w3)]
            core_leaves = [t.clone().requires_grad_() for t in (q, k, v, row, col)]
            show("training", {
                "conv3x3": lambda: train(conv, conv_leaves, g),  # noqa: B023
                "layer": lambda: train(layer, leaves, g),  # noqa: B023
                "projections": lambda: train(project, leaves[:2], torch.cat([g, g, g], 1).flatten(2)),  # noqa: B023
                "core": lambda: train(core, core_leaves, g),  # noqa: B023
            })
        if "unfold" in arguments.what and kernel_size == 7:
            with torch.no_grad():
                show("unfold", {
                    "core": lambda: core(q, k, v, row, col),  # noqa: B023
                    "unfold": lambda: unfold_attention(q, k, v, row, col, kernel_size),  # noqa: B023
                }, 15)


if __name__ == "__main__":
    main()
