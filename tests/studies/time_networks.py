"""Times whole networks with attention against the convolutional one, eager, frozen and in training, in turns.

    python tests/studies/time_networks.py frozen --out networks.csv
    python tests/studies/time_networks.py frozen training --network resnet26 --resolution 128 --threads 1

Ways: eager, folded (sasa_bench.fold), frozen (torch.compile with freezing), training, compiled-training. Batch norms
have statistics of no particular data. A ratio is the median of the ratios of calls made one after the other. Set
GOMP_SPINCOUNT=20000 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456, as
sasa-bench does, or page faults on fresh outputs are part of every time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from sasa_bench import fold, network

Call = Callable[[], object]

NETWORKS = {
    "convolutions": {"attention_groups": "none"},
    "attention": {},
    "attention, aware stem": {"stem": "aware_values"},
}
"""What is compared, the baseline first; in a RetinaNet the heads attend too."""

SECONDS, ROUNDS = 15.0, 60


def inference(model: nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(x)
        return y

    return call


def frozen(model: nn.Module, x: Tensor) -> Call:
    from torch._inductor import config

    with torch.no_grad():
        expected = model(x)
        with config.patch(freezing=True):
            compiled = torch.compile(model, fullgraph=True)
            y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = compiled(x)
        return y

    return call


def training(model: nn.Module, x: Tensor) -> Call:
    model.train()
    parameters = list(model.parameters())

    def call() -> None:
        for p in parameters:
            p.grad = None
        model(x).sum().backward()

    return call


def compiled_training(model: nn.Module, x: Tensor) -> Call:
    compiled = torch.compile(model, fullgraph=True)
    assert isinstance(compiled, nn.Module)
    return training(compiled, x)


WAYS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": inference,
    "folded": lambda model, x: inference(fold(model), x),
    "frozen": frozen,
    "training": training,
    "compiled-training": compiled_training,
}


def build(name: str, changes: dict[str, str]) -> nn.Module:
    """The network in eval mode, its batch norms with statistics that freezing cannot leave out."""
    groups = "1234+heads" if name.startswith("retinanet") else "1234"
    model = network(name, **{"attention_groups": groups, "impl": "fused"} | changes)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def measure(calls: dict[str, Call], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Seconds of each call, by name, in turns."""
    for call in calls.values():
        call(), call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(next(iter(samples.values()))) < ROUNDS:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - begin)
    return samples


def rows(way: str, samples: dict[str, list[float]]) -> list[dict[str, object]]:
    """One for each network: its times, and their ratio to those of the first, call by call."""
    baseline = next(iter(samples.values()))
    found = []
    for name, times in samples.items():
        ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
        found.append(
            {
                "way": way,
                "network": name,
                "time_median_s": statistics.median(times),
                "time_min_s": min(times),
                "ratio": statistics.median(ratios),
                "ratio_p20": ratios[len(ratios) // 5],
                "ratio_p80": ratios[-1 - len(ratios) // 5],
                "samples": len(times),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", choices=list(WAYS))
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, 3, options.resolution, options.resolution)
    found: list[dict[str, object]] = []
    for way in options.ways:
        calls = {name: WAYS[way](build(options.network, changes), x) for name, changes in NETWORKS.items()}
        found += rows(way, measure(calls, options.seconds))
        print(tabulate(found, headers="keys", floatfmt=".3g"), flush=True)
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    sys.exit(main())
