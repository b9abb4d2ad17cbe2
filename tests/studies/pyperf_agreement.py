"""Median times of six calls by `sasa_bench.measure` and by pyperf, in turns within the same processes.

`python tests/studies/pyperf_agreement.py` prints the median of either and the median of their paired ratios with its
95 % interval, and ends with 1 where a ratio is off by more than 3 %. Fresh processes for the two of a pair differ by
more than that where a host changes its speed within seconds; a pair within one process takes a fifth of a second.
pyperf times by its own worker code, with its own number of calls in a sample, in samples as long as ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from sasa_bench.results.environment import worker_environment
from sasa_bench.results.statistics import interval_of_median
from sasa_bench.timing.settings import Settings

LIMIT = 0.03
VALUES = 4
"""Samples of a call before the turn of the other."""

SETUP = """
import torch
from torch.nn import functional as F
torch.set_num_threads({threads})
torch.set_grad_enabled(False)
x = torch.randn(2, 64, 56, 56)
weight = torch.randn(64, 64, 3, 3) / 24
a = torch.randn(256, 256)
last = x.contiguous(memory_format=torch.channels_last)
rows = torch.randn(512, 784)
"""
CALLS = {
    "convolution": "F.conv2d(x, weight, padding=1)",
    "channels last": "F.conv2d(last, weight, padding=1)",
    "product": "torch.mm(a, a)",
    "softmax": "rows.softmax(-1)",
    "unfold": "F.unfold(x, 3, padding=1)",
    "add": "x + 1.0",
}

Pairs = list[tuple[float, float]]
"""Seconds per call by sasa-bench and by pyperf, of each round."""


def by_pyperf() -> Callable[[Callable[[], object]], float]:
    """What gives pyperf's median of a call, in seconds, measured in this process by the code of its workers."""
    import pyperf

    settings = Settings()
    runner = pyperf.Runner(min_time=settings.sample_s, values=VALUES, warmups=1, program_args=["study"])
    options = runner.parse_args(["--worker", "-l", "1", "--quiet"])
    loops: dict[object, int] = {}

    def median(call: Callable[[], object]) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            if call not in loops:
                options.calibrate_loops = True
                calibrated = runner.bench_func(f"calibration {len(loops)}", call)
                loops[call] = calibrated.get_metadata()["calibrate_loops"]
                options.calibrate_loops = False
            options.loops = loops[call]
            runner._bench_names.clear()  # it times a name once only
            return float(runner.bench_func("call", call).median())

    return median


def by_sasa_bench(call: Callable[[], object]) -> float:
    """Our median of a call, in seconds."""
    from sasa_bench.timing.sampling import measure

    settings = Settings(warmup_s=0, budget_s=VALUES * Settings().sample_s, least=VALUES, most=VALUES)
    return measure(call, settings=settings).median_s


def pairs_of_this_process(calls: dict[str, str], rounds: int, threads: int) -> dict[str, Pairs]:
    """Both medians of each call, `rounds` times; who is first alternates."""
    names: dict[str, object] = {}
    exec(SETUP.format(threads=threads), names)
    functions = {name: eval(f"lambda: {call}", names) for name, call in calls.items()}
    other = by_pyperf()
    pairs: dict[str, Pairs] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in functions.items():
            if number % 2:
                mine, theirs = by_sasa_bench(call), other(call)
            else:
                theirs, mine = other(call), by_sasa_bench(call)
            pairs[name].append((mine, theirs))
    return pairs


def pairs_of_a_fresh_process(rounds: int, threads: int) -> dict[str, Pairs]:
    """The same, of another process in a worker's environment."""
    command = [sys.executable, __file__, "--here", "--rounds", str(rounds), "--threads", str(threads)]
    environment = os.environ | worker_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {name: [(a, b) for a, b in pairs] for name, pairs in json.loads(done.stdout.splitlines()[-1]).items()}


def table(pairs: dict[str, Pairs]) -> tuple[str, float]:
    """A line for each call, and the ratio that is furthest from 1, as a share above 0."""
    lines, worst = [], 0.0
    for name, found in pairs.items():
        mine, theirs = (statistics.median(times) for times in zip(*found, strict=True))
        ratios = [a / b for a, b in found]
        ratio, (low, high) = statistics.median(ratios), interval_of_median(ratios)
        worst = max(worst, abs(ratio - 1))
        lines.append(
            f"{name:14} sasa-bench {mine * 1e6:9.1f} us   pyperf {theirs * 1e6:9.1f} us   "
            f"{ratio:.3f} ({low:.3f} to {high:.3f}), {len(found)} pairs"
        )
    return "\n".join(lines), worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60, help="in each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.here:
        print(json.dumps(pairs_of_this_process(CALLS, asked.rounds, asked.threads)))
        return 0
    pairs: dict[str, Pairs] = {name: [] for name in CALLS}
    for _ in range(asked.processes):
        for name, found in pairs_of_a_fresh_process(asked.rounds, asked.threads).items():
            pairs[name] += found
    lines, worst = table(pairs)
    print(f"{lines}\nfurthest apart: {worst:.1%}; allowed {LIMIT:.0%}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
