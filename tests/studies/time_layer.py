"""Host time that a LocalAttention2d adds to the operator beneath it, µs a call: the figure of docs/layer.md.

python tests/studies/time_layer.py [--rounds N]
The map is small, so that the host's work is most of a call. Module and operator take turns, 100 calls each; printed are
the medians over the turns, and of the differences the median and the 20th and 80th percentile.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sasa_bench import LocalAttention2d
from sasa_bench.impls import fused

CHANNELS, HEADS, SIDE, CALLS = 64, 8, 4, 100


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the mean of CALLS."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def compare(name: str, module: Callable[[], object], operator: Callable[[], object], rounds: int) -> None:
    pairs = [(seconds(module), seconds(operator)) for _ in range(rounds + 3)][3:]
    whole, bare = (1e6 * statistics.median(times) for times in zip(*pairs, strict=True))
    more = sorted(1e6 * (a - b) for a, b in pairs)
    low, high = more[len(more) // 5], more[-1 - len(more) // 5]
    print(
        f"{name:36} module {whole:6.1f}  operator {bare:6.1f}  more {statistics.median(more):5.1f} "
        f"({low:.1f} to {high:.1f})",
        flush=True,
    )


def compare_modes(impl: str, position: str, rounds: int) -> None:
    layer, x = (
        LocalAttention2d(CHANNELS, heads=HEADS, position=position, impl=impl),
        torch.randn(1, CHANNELS, SIDE, SIDE),
    )
    parameters, ones = (layer.w_qkv, layer.rel_row, layer.rel_col), torch.ones_like(x)
    run = torch.ops.sasa_bench.fused_attention_layer.default

    def module() -> Tensor:
        y: Tensor = layer(x)
        return y

    def operator() -> Tensor:
        y: Tensor = run(x, *parameters, 7, HEADS, False)
        return y

    with torch.no_grad():
        compare(f"{impl} {position}, no_grad", module, operator, rounds)
    with torch.inference_mode():
        compare(f"{impl} {position}, inference_mode", module, operator, rounds)
    compare(f"{impl} {position}, forward of training", module, operator, rounds)
    compare(
        f"{impl} {position}, both passes", lambda: module().backward(ones), lambda: operator().backward(ones), rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    fused.load()
    for impl in ("auto", "fused"):
        for position in ("relative", "none"):
            compare_modes(impl, position, rounds)


if __name__ == "__main__":
    main()
