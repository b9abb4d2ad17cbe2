"""What the compiled Triton kernels cost, read from their machine code; no device is needed to compile them.

python tests/cuda/triton_code.py    compiles the shipped specialisations and rewrites triton_resources.csv
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import machine_code

from sasa_bench.impls.triton import launch
from sasa_bench.impls.triton.launch import Function, Tunables

TABLE = Path(__file__).parent / "triton_resources.csv"
ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
AMD = "gfx942"
SIMDS = 4
"""Of a compute unit of AMD's CDNA 3, each with waves of its own (AMD Instinct MI300 ISA, section 2)."""
KERNELS = ("forward", "backward_queries", "backward_keys")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ELEMENTS = {F16: "fp16", BF16: "bf16", F32: "fp32"}
OF_FLOATS = ("log2_sum", "delta_map", "row_sums", "column_sums")
OF_POSITION = ("rel_row", "rel_col", "row_sums", "column_sums")
SHIPPED = [
    *((Function(F16, 7, width, True, False), side) for width, side in ((8, 56), (16, 28), (32, 14), (64, 7))),
    (Function(BF16, 7, 16, True, False), 28),
    (Function(F32, 7, 16, True, False, tf32=True), 28),
    (Function(F16, 7, 16, False, False), 28),
    (Function(F16, 7, 16, True, True), 28),
    (Function(F16, 19, 16, True, False), 28),
]
"""(function, image side): the stages of a ResNet at k = 7, element types, positions, borders, a large window."""
SECOND_STAGE = SHIPPED[1]


def specialisations() -> Iterator[tuple[str, Function, int, str]]:
    """(kernel, function, image side, architecture): all for the H100, the second stage for the others too."""
    for function, side in SHIPPED:
        for kernel in KERNELS:
            for arch in (*ARCHITECTURES, AMD) if (function, side) == SECOND_STAGE else ("sm_90",):
                yield kernel, function, side, arch


def version() -> str:
    """The version of Triton, which brings its own assembler."""
    import triton

    return str(triton.__version__)


def heading() -> str:
    """What the table holds for."""
    return f"Triton {version()}; rewritten by tests/cuda/triton_code.py"


def compiled(
    kernel: str, function: Function, side: int, tunables: Tunables, arch: str, ones: Sequence[str] = ()
) -> Any:
    """A kernel for "sm_90" or "gfx942", as its launch would specialise it: sizes that 16 divides, aligned pointers.

    Arguments named in `ones` are 1, which makes constants of them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sasa_bench.impls.triton import kernels

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    jitted = getattr(kernels, kernel)
    constants = launch.constants(kernel, function, side, tunables)
    signature, attributes = {}, {}
    for index, name in enumerate(jitted.arg_names):
        if name in OF_POSITION and not function.position:
            constants[name] = None
        if name in ones:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        size = name in ("height", "width", "heads")
        stride = name.endswith("stride")
        signature[name] = "i32" if size or stride else "*fp32" if name in OF_FLOATS else f"*{ELEMENTS[function.dtype]}"
        if not size:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(jitted, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tunables.warps, "num_stages": tunables.stages}
    return triton.compile(source, target=target, options=options)


@cache
def cost(kernel: str, function: Function, side: int, arch: str) -> dict[str, str]:
    """The row of the table for the unmeasured default."""
    tunables = launch.CHOICES[0]
    made = compiled(kernel, function, side, tunables, arch)
    if arch == AMD:
        return identity(kernel, function, side, arch) | {"warps": str(tunables.warps)} | _cost_on_amd(made)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = machine_code.tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = machine_code.tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, _, local = map(int, found.groups())
    opcodes = Counter(match[0].split(".")[0] for match in re.findall(machine_code.INSTRUCTION, listing))
    loop = Counter(name.split(".")[0] for name in machine_code.outer_loop(listing))
    resident = machine_code.occupancy(arch, registers, made.metadata.shared, 32 * tunables.warps) * 64
    return identity(kernel, function, side, arch) | {
        "warps": str(tunables.warps),
        "registers": str(registers),
        "shared_bytes": str(made.metadata.shared),
        "stack_bytes": str(stack + local),
        "spill_instructions": str(opcodes["STL"] + opcodes["LDL"]),
        "resident_warps": f"{resident:.0f}",
        "tensor_core_instructions": str(sum(n for name, n in opcodes.items() if name.endswith("MMA"))),
        "instructions": str(opcodes.total()),
        "loop_instructions": str(loop.total()),
        "loop_tensor_core_instructions": str(sum(n for name, n in loop.items() if name.endswith("MMA"))),
        "loop_exponentials": str(loop["MUFU"]),
    }


def _cost_on_amd(made: Any) -> dict[str, str]:
    """The columns that AMD's assembly has: registers are vector registers, warps are waves of 64 threads."""
    text = made.asm["amdgcn"]

    def figure(name: str) -> int:
        return max(int(value) for value in re.findall(rf"{name}: *(\d+)", text))

    return {
        "registers": str(figure(r"\.vgpr_count")),
        "shared_bytes": str(made.metadata.shared),
        "stack_bytes": str(figure(r"\.private_segment_fixed_size")),
        "spill_instructions": str(figure(r"\.vgpr_spill_count") + figure(r"\.sgpr_spill_count")),
        "resident_warps": str(SIMDS * figure("; Occupancy")),
        "tensor_core_instructions": str(len(re.findall(r"^\s+v_mfma", text, re.MULTILINE))),
        "instructions": str(len(re.findall(r"^\s+(?:[vs]|ds|buffer|global|flat)_\w+", text, re.MULTILINE))),
        "loop_instructions": "",
        "loop_tensor_core_instructions": "",
        "loop_exponentials": "",
    }


def identity(kernel: str, function: Function, side: int, arch: str) -> dict[str, str]:
    """The columns that name a specialisation."""
    return {"arch": arch, "kernel": kernel, "function": str(function), "image": f"{side}x{side}"}


def main() -> None:
    rows = []
    for item in specialisations():
        rows.append(cost(*item))
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    machine_code.write_table(rows, TABLE, heading())


if __name__ == "__main__":
    main()
