"""What the compiled kernels cost, read from their machine code: registers, spills, shared memory, loads.

python tests/cuda/machine_code.py    compiles the shipped specialisations, and every candidate of the search at the
                                     stages of a ResNet; rewrites resources.csv and candidates.csv; stopped, it resumes
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda import kernels
from sasa_bench.impls.cuda.kernels import Function, Tunables

TABLE = Path(__file__).parent / "resources.csv"
EVERY_CANDIDATE = Path(__file__).parent / "candidates.csv"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CANDIDATES_ON = "sm_90"
INSTRUCTION = r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)"
KERNELS = ("forward", "backward_queries", "backward_keys")
WORDS = {"LDS": 1, "LDS.64": 2, "LDS.128": 4}
FUSED = {"FFMA": 1, "FFMA2": 2}
# Shared memory of a multiprocessor in KiB (CUDA C++ Programming Guide, technical specifications per compute
# capability); the other limits that decide occupancy are the same for these three.
RESERVED_BYTES = 1024  # which the disassembler adds to a block's shared memory from sm_90 on
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (function, image side): the stages of a ResNet at k = 7, other windows, widths, element types, positions and
# borders, and a window that needs segments.
STAGES = [(Function(F32, 7, width, True, False), side) for width, side in ((8, 56), (16, 28), (32, 14), (64, 7))]
SHIPPED = [
    *STAGES,
    *((Function(F32, size, 16, True, False), 28) for size in (3, 11, 19, 31)),
    *((Function(F32, 7, width, True, False), 14) for width in (4, 128)),
    (Function(F16, 7, 8, True, False), 56),
    (Function(BF16, 7, 64, True, False), 7),
    (Function(F32, 7, 16, False, False), 28),
    (Function(F32, 7, 16, True, True), 28),
]


def specialisations(every_candidate: bool = False) -> Iterator[tuple[str, Function, int, Tunables]]:
    """(kernel, function, image side, tunables): each default, or all candidates of the stages."""
    for function, side in STAGES if every_candidate else SHIPPED:
        for kernel in KERNELS:
            found = kernels.candidates(kernel, function, side, side)
            for tunables in found if every_candidate else found[:1]:
                yield kernel, function, side, tunables


def shipped_rows() -> list[tuple[str, Function, int, Tunables, str]]:
    """What resources.csv holds: each default on each architecture."""
    return [(*item, arch) for item in specialisations() for arch in ARCHITECTURES]


def candidate_rows() -> list[tuple[str, Function, int, Tunables, str]]:
    """What candidates.csv holds: every candidate of the stages on one architecture."""
    return [(*item, CANDIDATES_ON) for item in specialisations(every_candidate=True)]


def heading() -> str:
    """What the tables hold for: the compiler, and the kernels but for comments and spaces."""
    code = re.sub(r"//[^\n]*|\s", "", kernels.source())
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    return f"NVRTC {nvrtc.nvrtc_version()}; kernels {digest}; rewritten by tests/cuda/machine_code.py"


def tool(name: str, *arguments: str) -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility(name)
    assert path is not None, f"{name} is missing: pip install 'sasa-bench[cuda-check]'"
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(listing: str) -> list[list[str]]:
    """Opcodes of each loop: what a backward branch repeats.

    That is every instruction that its target reaches and that reaches the branch without passing the target.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    ends: set[int] = set()
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(INSTRUCTION, line):
            index = len(opcodes)
            opcodes.append(found[1])
            conditional = "@" in line[: found.start(1)] or re.search(r"\bU?P\d", found[2])
            if found[1].startswith("BRA"):
                if target := re.search(r"\.L_\w+", found[2]):
                    jumps[index] = target[0]
            elif not found[1].startswith(("EXIT", "RET")):
                continue
            if not conditional:
                ends.add(index)
    before: dict[int, list[int]] = {}
    for index in range(len(opcodes)):
        after = [] if index in ends else [index + 1]
        if index in jumps and jumps[index] in labels:
            after.append(labels[jumps[index]])
        for other in after:
            before.setdefault(other, []).append(index)
    loops = []
    for index, name in jumps.items():
        start = labels.get(name, len(opcodes))
        if start > index:
            continue
        inside, ahead = {start}, [index]
        while ahead:
            if (at := ahead.pop()) not in inside:
                inside.add(at)
                ahead += before.get(at, [])
        loops.append([opcodes[at] for at in sorted(inside)])
    return loops


def _hot_loop(listing: str) -> list[str]:
    """Opcodes of the loop over window rows: the smallest loop with all the exponentials that any loop has."""
    loops = _loops(listing)
    most = max(loop.count("MUFU.EX2") for loop in loops)
    return min((loop for loop in loops if loop.count("MUFU.EX2") == most), key=len)


def _instructions_per_staged_word(listing: str) -> float:
    """Instructions that a thread runs for each word that it copies to shared memory: of the smallest loop that does."""

    def has(loop: list[str], start: str) -> bool:
        return any(name.startswith(start) for name in loop)

    copying = min((loop for loop in _loops(listing) if has(loop, "LDG") and has(loop, "STS")), key=len)
    return len(copying) / sum(name.startswith("STS") for name in copying)


def outer_loop(listing: str) -> list[str]:
    """Opcodes of the largest loop with an exponential, none where there is no such loop."""
    return max((loop for loop in _loops(listing) if "MUFU.EX2" in loop), key=len, default=[])


@lru_cache(maxsize=1)
def _occupancy_library() -> ctypes.CDLL:
    import emulation

    text = """
        #include <cstddef>
        #include <cstring>
        #include "cuda_occupancy.h"
        extern "C" int blocks(int major, int shared_kib, int registers, int shared, int threads) {
            cudaOccDeviceProp device;
            device.computeMajor = major, device.computeMinor = 0;
            device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
            device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
            device.sharedMemPerBlock = 49152, device.reservedSharedMemPerBlock = 1024;
            device.sharedMemPerMultiprocessor = size_t(shared_kib) << 10;
            device.sharedMemPerBlockOptin = size_t(shared_kib - 1) << 10;
            device.numSms = 1;
            cudaOccFuncAttributes kernel;
            kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = shared;
            kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
            kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
            kernel.maxDynamicSharedSizeBytes = 0;
            cudaOccDeviceState state;
            cudaOccResult result;
            auto failed =
                cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
            return failed ? -1 : result.activeBlocksPerMultiprocessor;
        }"""
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch) / "occupancy.cpp", Path(scratch) / "occupancy.so"
        source.write_text(text)
        includes = [f"-I{path}" for path in emulation.header_directories()]
        command = [emulation.COMPILER, "-w", "-fPIC", "-shared", *includes, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float:
    """Share of a multiprocessor's 64 warps that can be resident, by NVIDIA's cuda_occupancy.h."""
    major = int(arch.removeprefix("sm_")) // 10
    blocks = _occupancy_library().blocks(major, SHARED_KIB[arch], registers, shared, threads)
    assert blocks > 0, (arch, registers, shared, threads)
    return blocks * ((threads + 31) // 32) / 64


def cost(kernel: str, function: Function, side: int, tunables: Tunables, arch: str) -> dict[str, str]:
    """Compiles one specialisation and returns its row of the table."""
    cubin = nvrtc.compile_cubin(kernels.source(), kernels.expression(kernel, function, tunables), arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    if arch != "sm_80":
        shared -= RESERVED_BYTES
    loop = Counter(_hot_loop(listing))
    words = sum(count * loop[name] for name, count in WORDS.items())
    fused = sum(count * n for name, n in loop.items() if (count := FUSED.get(name.split(".")[0])))
    spills = len(re.findall(r"\s(?:STL|LDL)[.\s]", listing))
    return {
        **identity(kernel, function, side, tunables, arch),
        "threads": str(tunables.threads),
        "registers": str(registers),
        "shared_bytes": str(shared),
        "stack_bytes": str(stack + local),
        "spill_instructions": str(spills),
        "occupancy": f"{occupancy(arch, registers, shared, tunables.threads):.3f}",
        "loop_shared_loads": str(sum(loop[name] for name in WORDS)),
        "loop_shared_words": str(words),
        "loop_fma": str(fused),
        "loop_shuffles": str(sum(n for name, n in loop.items() if name.startswith("SHFL"))),
        "shared_loads_per_fma": f"{sum(loop[name] for name in WORDS) / fused:.3f}",
        "shared_words_per_fma": f"{words / fused:.3f}",
        "instructions_per_staged_word": f"{_instructions_per_staged_word(listing):.1f}",
    }


def identity(kernel: str, function: Function, side: int, tunables: Tunables, arch: str) -> dict[str, str]:
    """The columns that say which specialisation a row is of."""
    plan = {name: str(value) for name, value in vars(tunables).items()}
    return {"arch": arch, "kernel": kernel, "function": str(function), "image": f"{side}x{side}", **plan}


def read_table(path: Path = TABLE) -> list[dict[str, str]]:
    """The committed rows."""
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_table(rows: list[dict[str, str]], path: Path, heading: str) -> None:
    """Writes the rows, below what they hold for."""
    with open(path, "w", newline="") as file:
        file.write(f"# {heading}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    tables = {TABLE: shipped_rows(), EVERY_CANDIDATE: candidate_rows()}
    names = list(identity(*tables[TABLE][0]))
    known = {}
    for path in tables:
        if path.read_text().startswith(f"# {heading()}\n"):
            known |= {tuple(row[name] for name in names): row for row in read_table(path)}
    for path, items in tables.items():
        for number, item in enumerate(items):
            key = tuple(identity(*item).values())
            if key not in known:
                known[key] = cost(*item)
                print(
                    f"{path.name} {number + 1}/{len(items)} {item[0]} {item[1]} {item[4]}", file=sys.stderr, flush=True
                )
                write_table([known[k] for i in items if (k := tuple(identity(*i).values())) in known], path, heading())
        write_table([known[tuple(identity(*item).values())] for item in items], path, heading())


if __name__ == "__main__":
    main()
