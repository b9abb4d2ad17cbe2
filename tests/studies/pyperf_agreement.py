"""Median times of six calls by `sasa_bench.measure` and by pyperf, in the same environment, in alternating processes.

`python tests/studies/pyperf_agreement.py --rounds 5` prints both medians of each call and their ratio with its 95 %
interval over the rounds, and ends with 1 where one is off by more than 3 %. In every round each call is timed by a
fresh process of either kind, one right after the other: a host changes its speed within minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sasa_bench.results.environment import worker_environment
from sasa_bench.results.statistics import ratio_of_times

LIMIT = 0.03
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


def ours(call: str, threads: int, budget_s: float) -> list[float]:
    """Samples, in seconds per call; of this process."""
    from sasa_bench.timing.sampling import measure
    from sasa_bench.timing.settings import Settings

    names: dict[str, object] = {}
    exec(SETUP.format(threads=threads), names)
    return list(measure(eval(f"lambda: {call}", names), settings=Settings(budget_s=budget_s)).samples_s)


def of_a_fresh_process(call: str, threads: int, budget_s: float) -> list[float]:
    """The same, of another process in a worker's environment."""
    command = [sys.executable, __file__, "--ours", call, "--threads", str(threads), "--budget", str(budget_s)]
    environment = os.environ | worker_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_pyperf(call: str, threads: int, folder: Path) -> list[float]:
    """Values of one process of pyperf, in seconds per call."""
    import pyperf

    out = folder / "pyperf.json"
    out.unlink(missing_ok=True)
    inherited = ",".join(("PYTHONPATH", "PATH", *worker_environment()))
    options = ["-p", "1", "-n", "7", "-w", "2", "--min-time", "0.02", "--quiet", "--inherit-environ", inherited]
    command = [sys.executable, "-m", "pyperf", "timeit", *options, "-o", str(out), "-s", SETUP.format(threads=threads)]
    environment = os.environ | worker_environment()
    subprocess.run([*command, call], capture_output=True, text=True, check=True, env=environment)
    return [float(value) for value in pyperf.Benchmark.load(str(out)).get_values()]


Rounds = dict[str, list[list[float]]]
"""Call -> samples of each round."""


def table(ours: Rounds, others: Rounds) -> tuple[str, float]:
    """A line for each call, and the ratio that is furthest from 1, as a share above 0."""
    lines, worst = [], 0.0
    for name, samples in ours.items():
        mine, other = (statistics.median(s for one in rounds for s in one) for rounds in (samples, others[name]))
        ratio, low, high = ratio_of_times(samples, others[name])
        worst = max(worst, abs(ratio - 1))
        lines.append(
            f"{name:14} sasa-bench {mine * 1e6:9.1f} us   pyperf {other * 1e6:9.1f} us   "
            f"{ratio:.3f} ({low:.3f} to {high:.3f})"
        )
    return "\n".join(lines), worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.ours:
        print(json.dumps(ours(asked.ours, asked.threads, asked.budget)))
        return 0
    mine: Rounds = {name: [] for name in CALLS}
    others: Rounds = {name: [] for name in CALLS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            for name, call in CALLS.items():
                for who in (mine, others) if number % 2 else (others, mine):
                    if who is mine:
                        mine[name].append(of_a_fresh_process(call, asked.threads, asked.budget))
                    else:
                        others[name].append(by_pyperf(call, asked.threads, Path(folder)))
    lines, worst = table(mine, others)
    print(f"{lines}\nfurthest apart: {worst:.1%}; allowed {LIMIT:.0%}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
