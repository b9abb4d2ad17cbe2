"""Tests of the tests: bugs planted in the CUDA source, each of which the right check must catch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dense_reference
import emulation
import pytest
from dense_reference import Problem
from test_cuda_numerics import SHUFFLED, run

from sasa_bench.impls.cuda import kernels

HERE = Path(__file__).parent
# Two lanes a pixel, a channel too few for them, tiles that hang over the border, several stages.
PROBLEM = Problem(height=6, width=9, head_width=15, kernel_size=5, heads=2, batch=2)
WRONG = "wrong values"


def several_stages(key: str, candidates: Sequence[kernels.Tunables]) -> kernels.Tunables:
    """Small tiles whose windows pass through shared memory in several stages, of three images where there are four."""
    chosen = next(tunables for tunables in candidates if tunables.pixels == 2)
    return replace(chosen, columns=3, rows=4, images=3, staged=3)


@dataclass(frozen=True)
class Mutant:
    """A text of the source, what its first occurrence becomes, and the report that must follow."""

    name: str
    text: str
    becomes: str
    caught_as: str

    def source(self) -> str:
        assert self.text in kernels.source(), f"{self.text!r} is no longer in the source"
        return kernels.source().replace(self.text, self.becomes, 1)


BARRIER = "        __syncthreads();\n"
STAGE = "        stage_rows(place.first_y - P::RADIUS + first);\n"
STORE = "one_to[n * P::COPIERS]"
STAGED_LINE = "member * MEMBER + channel * P::PLANE"
INSIDE = "channel < there && static_cast<unsigned>(y) < static_cast<unsigned>(sizes.height)"
ACROSS = "x < static_cast<unsigned>(sizes.width)"
THERE = "image < sizes.images ? planes : 0"
SPARE = "slot >= P::LANES * P::COLUMNS * P::IMAGES || first_image + member >= sizes.images"
STEP = "(image / heads) * step"
RESCALE = "for (int c = 0; c < P::CHANNELS; ++c) y[p][c] *= rescale;"
LANE_ADDS = "if (adds) {\n#pragma unroll\n                        for (int p"
LANE_WRITES = "if (place.lane == 0 && place.inside(p)) {"
PLANE = "static_cast<long long>(image) * planes"
SUM = "sum_over_lanes<P>(weights[p]);"
BORDER = "P::ZERO_BORDER || (x >= 0 && x < place.width)"
MUTANTS = [
    Mutant("no barrier after staging", STAGE + BARRIER, STAGE, "race: shared"),
    Mutant("no barrier before staging", BARRIER + STAGE, STAGE, "race: shared"),
    Mutant(
        "no barrier before the block's sum",
        BARRIER + "        constexpr int",
        "constexpr int",
        "uninitialised",
    ),
    Mutant("no barrier in the last sum", "= sum;\n    __syncthreads();", "= sum;", "uninitialised"),
    Mutant("barrier for some", BARRIER + STAGE, f"if (place.row) {BARRIER}" + STAGE, "divergent barrier"),
    Mutant("halo not cut on the left", ACROSS, "static_cast<int>(x) < sizes.width", "out of bounds: global read"),
    Mutant("halo not cut below", INSIDE, "channel < there && y >= 0", "out of bounds: global read"),
    Mutant("padded channels read", INSIDE, INSIDE.replace("channel < there && ", ""), "out of bounds"),
    Mutant("shared index off by one", STORE, STORE.replace("COPIERS]", "COPIERS + 1]"), "uninitialised: shared"),
    Mutant(
        "shared plane off by one", STAGED_LINE, STAGED_LINE.replace("channel", "(channel + 1)"), "out of bounds: shared"
    ),
    Mutant("lanes write one cell", LANE_WRITES, "if (place.inside(p)) {", "race: global"),
    Mutant("lanes add to one cell", LANE_ADDS, LANE_ADDS.replace("adds", "!place.spare"), "race: shared"),
    Mutant("misaligned vector", "place.column * P::PIXELS);", "place.column * P::PIXELS + 1);", "misaligned"),
    Mutant("shuffle for some lanes", SUM, "if (place.lane == 0) " + SUM, "divergent shuffle"),
    Mutant("shuffle mask too low", "<< (warp_lane - warp_lane % P::LANES)", "<< 0", "divergent shuffle"),
    Mutant(
        "store not guarded",
        "if (place.inside(p) && channel < P::HEAD_WIDTH) {",
        "if (true) {",
        "race: global",
    ),
    Mutant("wrong head offset", "(head * P::ROW_HALF + channel)", "(channel)", WRONG),
    Mutant("wrong plane", PLANE, PLANE.replace("image", "head"), "race: global"),
    Mutant("images that are not there are read", THERE, "planes", "out of bounds: global read"),
    Mutant("spare threads write", SPARE, "false", "race: global"),
    Mutant("images share shared memory", "member * MEMBER +", "", "uninitialised: shared"),
    Mutant("another image's keys", "place.member * P::MEMBER + ", "", WRONG),
    Mutant("batch entries in the wrong place", STEP, "(image / heads) * (step + 1)", WRONG),
    Mutant("partial sums of another image", "(image) * place.tiles", "(place.image) * place.tiles", "race: global"),
    Mutant("sum not rescaled", "total[p] *= rescale;", "", WRONG),
    Mutant("values not rescaled", RESCALE, "", WRONG),
    Mutant("border takes part", BORDER, "true", WRONG),
    Mutant("window not mirrored", "channel, P::KERNEL_SIZE - 1 - a)", "channel, a)", WRONG),
    Mutant("delta forgotten", "(ds[p][b] - delta_line[p + b])", "ds[p][b]", WRONG),
    Mutant("batch forgotten in the last sum", "n < batch * tiles", "n < tiles", WRONG),
]
# For the sanitizers: a register array read past its end, and a shift by the width of the type.
INDEX = ("weights[p][b] * line[p + b]", "weights[p][b] * line[p + b + 2]")
SHIFT = ("(P::LANES == 32 ? 0xffffffffu : (1u << (P::LANES % 32)) - 1u)", "((1u << P::LANES) - 1u)")
UNDEFINED = kernels.source().replace(*INDEX).replace(*SHIFT)


@pytest.fixture(scope="module")
def library() -> Path:
    """The shipped source and every mutant, as versions of it, in one library."""
    recorder = emulation.RecordingRuntime(several_stages)
    run(recorder, PROBLEM)
    sources = {"shipped": kernels.source()} | {mutant.name: mutant.source() for mutant in MUTANTS}
    return emulation.build(recorder.expressions, sources, ("-O0",))


def findings(library: Path, name: str) -> list[str]:
    """What the emulator and the comparison with float64 report for a version of the source."""
    runtime = emulation.EmulatedRuntime(library, SHUFFLED, several_stages, name)
    got = run(runtime, PROBLEM)
    return runtime.violations + [f"{WRONG}: {line}" for line in dense_reference.failures(PROBLEM, got)]


def test_without_a_bug_nothing_is_reported(library):
    assert findings(library, "shipped") == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(library, mutant):
    found = findings(library, mutant.name)
    assert any(mutant.caught_as in line for line in found), found


@pytest.mark.slow
def test_sanitizers_pass_the_kernels_and_catch_planted_bugs():
    """One process with address and undefined-behaviour sanitizers: the shipped source, then a mutant."""
    finder = [emulation.COMPILER, "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(finder, capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1]))),
    }
    command = [sys.executable, str(HERE / "sanitized_checks.py")]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert INDEX[1] in UNDEFINED
    assert SHIFT[1] in UNDEFINED
    _, shipped, undefined = re.split(r"^running .*$", made.stderr, flags=re.MULTILINE)
    assert "runtime error" not in shipped, shipped[-4000:]
    assert "AddressSanitizer" not in shipped, shipped[-4000:]
    assert "out of bounds for type" in undefined, undefined[-4000:]
    assert "shift exponent 32 is too large" in undefined, undefined[-4000:]
