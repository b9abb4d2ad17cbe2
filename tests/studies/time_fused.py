"""Times the fused layer against a 3x3 convolution, interleaved in one process: the figures of docs/fused.md.

python tests/studies/time_fused.py [forward] [training] [unfold] [--rounds N]
Set OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
MALLOC_TOP_PAD_=268435456, or page faults on fresh outputs are part of every time.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from sasa_bench.impls import fused

# channels, resolution, kernel_size
CASES = [(64, 56, 7), (128, 28, 7), (256, 14, 7), (512, 7, 7), (128, 28, 19)]
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
    windows = (F.unfold(t, kernel_size, padding=kernel_size // 2) for t in (k, v))
    k, v = (t.reshape(batch, HEADS, d, -1, height * width) for t in windows)
    rows, cols = rel_row[..., :, None], rel_col[..., None, :]
    rel = torch.cat([rows.expand(-1, -1, -1, kernel_size), cols.expand(-1, -1, kernel_size, -1)], dim=1).flatten(2)
    weights = (q * (k + rel[None, ..., None])).sum(2, keepdim=True).softmax(3)
    return (weights * v).sum(3).reshape(batch, channels, height, width)


def train(function, leaves, g):
    torch.autograd.grad(function(*leaves), leaves, g)


def time_case(channels, resolution, kernel_size, wanted, rounds):
    d = channels // HEADS
    case = SimpleNamespace(kernel_size=kernel_size, heads=HEADS, border="mask")
    core, layer = fused.IMPL.attend(case), fused.IMPL.layer(case)
    x, g, q, k, v = (torch.randn(BATCH, channels, resolution, resolution) for _ in range(5))
    g3 = torch.cat([g, g, g], dim=1).flatten(2)
    w3 = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
    w = torch.randn(3 * channels, channels) / channels**0.5
    row, col = torch.randn(HEADS, d // 2, kernel_size) / d, torch.randn(HEADS, d - d // 2, kernel_size) / d

    def conv(x, w):
        return F.conv2d(x, w, padding=1)

    def project(x, w):
        return torch.bmm(w.expand(BATCH, -1, -1), x.flatten(2))

    def show(what, functions):
        line = " ".join(f"{n} {t * 1e3:.2f} ms ({r:.2f})" for n, (t, r) in medians(functions, rounds).items())
        print(f"{channels:4d} ch {resolution:2d}² k {kernel_size:2d} {what:8s} {line}", flush=True)

    if "forward" in wanted:
        with torch.no_grad():
            functions = {
                "conv3x3": lambda: conv(x, w3),
                "layer": lambda: layer(x, w, row, col),
                "projections": lambda: project(x, w),
                "core": lambda: core(q, k, v, row, col),
            }
            show("forward", functions)
    if "training" in wanted:
        leaves = [t.clone().requires_grad_() for t in (x, w, row, col)]
        conv_leaves = [t.clone().requires_grad_() for t in (x, w3)]
        core_leaves = [t.clone().requires_grad_() for t in (q, k, v, row, col)]
        functions = {
            "conv3x3": lambda: train(conv, conv_leaves, g),
            "layer": lambda: train(layer, leaves, g),
            "projections": lambda: train(project, leaves[:2], g3),
            "core": lambda: train(core, core_leaves, g),
        }
        show("training", functions)
    if "unfold" in wanted and kernel_size == 7:
        with torch.no_grad():
            functions = {
                "core": lambda: core(q, k, v, row, col),
                "unfold": lambda: unfold_attention(q, k, v, row, col, kernel_size),
            }
            show("unfold", functions)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wanted", nargs="*", default=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    for case in CASES:
        time_case(*case, arguments.wanted, arguments.rounds)


if __name__ == "__main__":
    main()
