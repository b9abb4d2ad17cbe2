"""`fused`: local self-attention as one native CPU kernel, compiled on this machine at first use.

The operator is eq. 2 and 4 of Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models":
softmax over the window of q.k + q.r, times v, without a 1/sqrt(d). `csrc/local_attention.h` holds the
kernels and says how they work, `csrc/fused.cpp` the torch operators `sasa_bench::fused_*` around them,
docs/fused.md what was measured.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import (
    Core,
    Impl,
    Info,
    Window,
    _flops,
    _folding,
    _native,
    _phases,
    _stem,
    attends,
    layers_only,
    local_attention,
)
from sasa_bench.impls._attention import ATTENTION, CSRC, kernels
from sasa_bench.impls._native import ISAS, Library, chosen_isa, cpu_flags
from sasa_bench.impls._operator import autocast
from sasa_bench.impls._phases import Phases
from sasa_bench.ops.tensors import Call, Tensors, add_absolute, dtype_of

_LOADED: list[Library] = []
"""The library of the operators that this process has loaded: torch takes operators of one name once, so its path stays,
whatever happens to the files it was made of."""


def _operators() -> Library:
    """The library of the torch operators."""
    if _LOADED:
        return _LOADED[0]
    root = Path(torch.__file__).parent
    include = root / "include"
    return Library(
        "fused_operators",
        CSRC / "fused.cpp",
        (CSRC / "kernel_table.h", CSRC / "parallel.h", CSRC / "qkv.h", *sorted((CSRC / "operators").glob("*.h"))),
        ("-O2", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        ("-lc10", "-ltorch_cpu", "-ltorch"),
        ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"), f"-L{root / 'lib'}"),
        (torch.__version__,),
    )


def native(case: Case) -> list[Library]:
    """The libraries that a case needs on this machine. Raises the errors of `chosen_isa`."""
    layers = _of_layers() if attends(case) else []
    return layers if case.stem in ("none", "conv") else [*layers, _stem.library()]


def _of_layers() -> list[Library]:
    return [_operators(), *kernels(chosen_isa())]


def build(isas: list[str]) -> None:
    """Compiles the operators and the given builds of the kernels at once, those that are not in the cache.

    Raises RuntimeError with the compiler's words.
    """
    operators = [] if _LOADED else [_operators()]
    parts = [*operators, *(library for isa in isas for library in kernels(isa))]
    _native.build(list(dict.fromkeys(parts)))


_LOADING = threading.RLock()
"""Threads that run their first layer at the same time load the operators once."""


@cache
def _load_operators() -> None:
    library = _operators()
    torch.ops.load_library(str(library.path))
    _LOADED.append(replace(library, loaded=library.path))
    for name in ("fused_local_attention", "fused_attention_layer"):
        autocast(name, "CPU")
    for name, formula in (
        ("fused_local_attention", _flops.forward),
        ("fused_local_attention_forward", _flops.forward),
        ("fused_local_attention_backward", _flops.backward),
        ("fused_attention_layer", _flops.layer),
        ("fused_attention_layer_forward", _flops.layer),
        ("fused_attention_layer_backward", _flops.layer_backward),
        ("fused_attention_layer_packed", _flops.layer_packed),
    ):
        _flops.count(name, formula)


def load(isa: str | None = None) -> None:
    """Makes the operators usable with the kernels of `isa` (default: `chosen_isa()`), compiling them if
    needed.

    Loading another build later replaces the kernels of the whole process; a backward pass has to run with the build of
    its forward pass, whose layout the saved tensors have. Raises RuntimeError when there is no compiler (see `missing`)
    or it fails, and the errors of `chosen_isa`.
    """
    isa = isa or chosen_isa()
    with _LOADING:
        build([isa])
        _load_operators()
        if not torch.ops.sasa_bench.fused_use_kernels(*(str(library.path) for library in kernels(isa))):
            load(ATTENTION[isa])  # the operating system does not give this process the tiles


def phases(run: Callable[[], object], threads: int, calls: int) -> Phases:
    """Where the time of `run`, a call of this kernel, goes inside it. Raises as `load`."""
    load()
    isa = chosen_isa()
    builds = {timed: kernels(isa, timed) for timed in (True, False)}
    _native.build(builds[True])

    def use(timed: bool) -> None:
        if not torch.ops.sasa_bench.fused_use_kernels(*(str(library.path) for library in builds[timed])):
            raise RuntimeError(f"the operating system does not give this process what the build {isa} needs")

    return _phases.count(run, use, [library.path for library in builds[True]], threads, calls)


def missing() -> str | None:
    """What keeps the kernel from running on this machine, with the command that would help; None if nothing
    does.

    Compiles nothing. Raises the errors of `chosen_isa`.
    """
    return next((reason for library in (*_of_layers(), _stem.library()) if (reason := library.missing())), None)


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """The core: q, k, v [B, C, H, W] with each head's channels contiguous -> y; differentiable once.

    float32, or bfloat16 or float16 with sums in float32.
    """
    y: Tensor = torch.ops.sasa_bench.fused_local_attention.default(
        q, k, v, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def layer(window: Window, x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
    """The whole layer: x [B, C, H, W], w_qkv [3 C, C], the rows of queries, then of keys and of values -> y.

    Where heads fill the lanes of the kernel, each task projects the rows that it needs next, in the layout that it
    computes in. Differentiable once; float32, bfloat16 or float16.
    """
    y: Tensor = torch.ops.sasa_bench.fused_attention_layer.default(
        x, w_qkv, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def pack(
    window: Window,
    w_qkv: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    norm: nn.BatchNorm2d | None = None,
    relu: bool = False,
) -> Callable[[Tensor], Tensor]:
    """The layer at inference, x [B, C_in, H, W] -> y [B, C, H, W]: its weights packed once, and what follows folded in.

    w_qkv [3 C, C_in]; rel_row [N, d // 2, K] and rel_col [N, d - d // 2, K], or None for both.

    A batch norm (its running statistics) becomes a factor of the rows of w_qkv that make values, because the layer is
    linear in them, and a bias added to y in float32; `relu` applies to the result. Images may be channels-last, y is
    then too. Changes of the parameters after the call have no effect; there is no gradient. Raises ValueError for a
    batch norm without running statistics, and what `load` raises.
    """
    load()
    scale, bias = (None, None) if norm is None else _folding.scale_and_shift(norm)
    packed = _folding.packed(w_qkv.detach(), window.heads, scale)
    rel = [None if t is None else t.detach() for t in (rel_row, rel_col)]
    rest = (bias, w_qkv.shape[0] // 3, window.rows, window.heads, window.border == "zero", relu)

    def whole(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.sasa_bench.fused_attention_layer_packed.default(x, packed, *rel, *rest)
        return y

    return whole


def _build_packed(case: Case, tensors: Tensors) -> Call:
    whole = pack(Window.of(case), tensors["w_qkv"], tensors.get("rel_row"), tensors.get("rel_col"))
    return lambda: whole(add_absolute(case, tensors))


def _packable(case: Case) -> str | None:
    if case.scope != "layer" or case.mode != "forward":
        return "weights are packed ahead for inference: a layer's forward pass only"
    return layers_only(case) or _supports(case)


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the fused kernel has square windows, not {window.rows} x {window.columns}"
    return _cannot_run(x.device.type, x.dtype)


def _cannot_run(device: str, dtype: torch.dtype) -> str | None:
    if device not in ("cpu", "meta"):
        return f"the fused kernel runs on the CPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"the fused kernel computes float32, bfloat16 and float16, not {name}"
    return None


def _supports(case: Case) -> str | None:
    return _cannot_run(case.device, dtype_of(case))


def details() -> list[str]:
    """A line for each build: whether this processor runs it, whether it is compiled, which one is used."""
    chosen, lines = chosen_isa(), []
    for isa, (_, needed) in ISAS.items():
        if lacking := sorted(needed - cpu_flags()):
            state = f"not on this processor, which lacks {', '.join(lacking)}"
        else:
            built = all(library.is_built() for library in (_operators(), *kernels(isa)))
            state = "compiled" if built else "compiled at first use"
        lines.append(f"build {isa}: {state}{', in use' if isa == chosen else ''}")
    return lines


IMPL = local_attention(
    "fused",
    "one native CPU kernel, compiled here at first use; no tensor with K x K entries",
    core=Core(
        run,
        layer=layer,
        refuses=_refuses,
        load=load,
        pack=pack,
        compiled=_folding.register,
        keeps_output=True,
        recomputes=True,
        transforms=False,
        portable=False,
    ),
    stem=_stem.run,
    supports=_supports,
    missing=missing,
    details=details,
    phases=phases,
    native=native,
)
PACKED = Impl(
    name="fused_packed",
    op=ops.get("local_attention"),
    summary="the native CPU kernel at inference: channels-last, weights packed ahead",
    build=_build_packed,
    supports=_packable,
    missing=missing,
    computes=lambda case: case.with_(memory_format="channels_last"),
    info=Info(phases=phases, native=native),
)
