"""The registry: every implementation by name.

To add one, write sasa_bench/impls/NAME.py that defines `IMPL` and add a line to BUILTIN. Nothing else names it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path

from sasa_bench.case import UserError, closest
from sasa_bench.impls.implementation import Impl, Info
from sasa_bench.ops.op import Op
from sasa_bench.results.record import ImplInfo
from sasa_bench.results.revision import COMPILED, revision

BUILTIN = {
    "reference": "sasa_bench.impls.reference:IMPL",
    "naive": "sasa_bench.impls.naive:IMPL",
    "unfold": "sasa_bench.impls.unfold:IMPL",
    "blocked": "sasa_bench.impls.blocked:IMPL",
    "gathered": "sasa_bench.impls.gathered:IMPL",
    "fused": "sasa_bench.impls.fused:IMPL",
    "fused_packed": "sasa_bench.impls.fused:PACKED",
    "cuda": "sasa_bench.impls.cuda:IMPL",
    "triton": "sasa_bench.impls.triton:IMPL",
    "onnx_unfold": "sasa_bench.impls.unfold:ONNX",
    "onnx_blocked": "sasa_bench.impls.blocked:ONNX",
    "onnx": "sasa_bench.impls.gathered:ONNX",
    "onnx_dynamic": "sasa_bench.impls.gathered:ONNX_DYNAMIC",
    "onnx_fused": "sasa_bench.impls.onnx_fused:IMPL",
    "onnx_conv3x3": "sasa_bench.impls.convolution:ONNX_CONV3X3",
    "conv3x3": "sasa_bench.impls.convolution:CONV3X3",
    "conv3x3_channels_last": "sasa_bench.impls.convolution:CONV3X3_CHANNELS_LAST",
    "conv3x3_packed": "sasa_bench.impls.convolution:CONV3X3_PACKED",
    "conv_kxk": "sasa_bench.impls.convolution:CONV_KXK",
    "depthwise_kxk": "sasa_bench.impls.convolution:DEPTHWISE_KXK",
    "conv1x1": "sasa_bench.impls.convolution:CONV1X1",
    "global_attention": "sasa_bench.impls.global_attention:IMPL",
    "squeeze_excitation": "sasa_bench.impls.squeeze_excitation:IMPL",
    "non_local": "sasa_bench.impls.non_local:IMPL",
    "criss_cross": "sasa_bench.impls.criss_cross:IMPL",
    "sdpa_dense": "sasa_bench.impls.sdpa_dense:IMPL",
    "flex_attention": "sasa_bench.impls.flex_attention:IMPL",
    "compiled_unfold": "sasa_bench.impls.unfold:COMPILED",
    "compiled_blocked": "sasa_bench.impls.blocked:COMPILED",
    "compiled_sdpa_dense": "sasa_bench.impls.sdpa_dense:COMPILED",
    "natten": "sasa_bench.impls.natten:IMPL",
    "halo_attention": "sasa_bench.impls.halo_attention:IMPL",
    "leaderj1001": "sasa_bench.impls.leaderj1001:IMPL",
}
"""Name -> "module:object" of each implementation that comes with the package."""

ANYWHERE = "unfold"
"""The local attention that runs on every device and in every dtype, forward and backward."""

IN_NETWORKS = ("conv3x3", "unfold", "fused", "cuda")
"""What whole networks are timed with, where it is registered and the machine can run it."""

ENTRY_POINTS = "sasa_bench.impls"
"""The entry-point group through which other packages register theirs; each entry is an Impl."""


NAME = re.compile(r"\w[\w.-]*")
"""A name is one word in tables, in the keys of a gate and on command lines."""


class UnknownImplError(UserError):
    """A name that no implementation has, or a file that defines none."""


def names() -> list[str]:
    """Every registered name, in the order of the table: built in first, then those of other packages."""
    return [*BUILTIN, *(name for name in sorted(_plugins()) if name not in BUILTIN)]


def index(name: str) -> int:
    """The place of an implementation in the registry; one that comes from a file stands behind all others."""
    known = names()
    return known.index(name) if name in known else len(known)


def info(impl: Impl) -> ImplInfo:
    """What readers know of it."""
    about = impl.info
    return ImplInfo(
        name=impl.name,
        op=impl.op.name,
        summary=impl.summary,
        index=index(impl.name),
        differs=about.differs,
        exports=about.exports,
        any_size=about.any_size,
        library=about.library,
    )


def get(name: str) -> Impl:
    """The implementation of that name, or the IMPL of that .py file. Raises UnknownImplError."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    elif name in (plugins := _plugins()):
        return _from_plugin(plugins[name])
    else:
        raise UnknownImplError(
            f"unknown implementation {name!r}: {closest(name, names())}there are {', '.join(names())}; a file of your "
            "own is named by its path"
        )
    return _checked(found, name)


def _plugins() -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry)
    return found


def unused() -> dict[str, str]:
    """Entry points whose name another implementation has, "name (module:object)" -> what to do."""
    used = _plugins()
    return {
        f"{entry.name} ({entry.value})": f"not used: {entry.name!r} is "
        + ("built in" if entry.name in BUILTIN else f"{used[entry.name].value} already")
        + "; the package that registers it has to choose another name"
        for entry in metadata.entry_points(group=ENTRY_POINTS)
        if entry.name in BUILTIN or used[entry.name] != entry
    }


def _from_plugin(entry: metadata.EntryPoint) -> Impl:
    source = f"the entry point {entry.name} = {entry.value}"
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise UnknownImplError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error
    impl = _checked(found, source)
    if impl.name != entry.name:
        raise UnknownImplError(f"{source} gives an implementation called {impl.name!r}: the two names must be equal")
    return impl


def _from_file(path: Path) -> Impl:
    """The IMPL of a file, which may import files beside it; each file sees its own, whatever others were loaded."""
    if not path.is_file():
        raise UnknownImplError(f"{path}: no such file; give the path of a Python file that defines IMPL")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"sasa_bench_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownImplError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UnknownImplError(f"{path} cannot be loaded: {_where(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent))
        beside = [sys.modules.pop(name) for name in set(sys.modules) - before if _lies_beside(name, path.parent)]
    impl = _checked(getattr(module, "IMPL", None), str(path))
    if impl.name in names():
        raise UnknownImplError(
            f"{path}: its IMPL is called {impl.name!r}, which is already registered: choose another name"
        )
    _sources[str(path)] = [path, *(Path(module.__file__) for module in beside if module.__file__)]
    return impl


_sources: dict[str, list[Path]] = {}
"""File of an implementation -> the Python files that it was loaded from."""


def source(spec: str) -> dict[str, str]:
    """What a file of one's own was when it was loaded: `digest`, and `commit` where git tracks it.

    Empty for what is registered: the machine's commit and libraries say what that was.
    """
    if not spec.endswith(".py"):
        return {}
    found = {"digest": digest(spec)}
    if known := revision(Path(spec).resolve()):
        found["commit"] = known[0] + ("+dirty" if known[1] else "")
    return found


def digest(spec: str) -> str:
    """Of a file of one's own and what it loads or compiles from its folder, as they are now; "" for the registered."""
    if not spec.endswith(".py"):
        return ""
    path = Path(spec).resolve()
    if str(path) not in _sources:
        get(spec)
    whole = hashlib.sha256()
    for file in sorted({*_sources[str(path)], *(f for f in path.parent.iterdir() if f.suffix in COMPILED)}):
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def _lies_beside(name: str, folder: Path) -> bool:
    """Whether the module of that name is a file or package in `folder`, rather than a library installed below it."""
    top = name.partition(".")[0]
    file = getattr(sys.modules[name], "__file__", None)
    beside = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    return top != "sasa_bench" and beside and bool(file) and Path(str(file)).resolve().is_relative_to(folder)


def line(error: BaseException, path: Path) -> str:
    """Which line of this file an exception came through last, as " (line N)"; "" for none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


def _where(error: BaseException, path: Path) -> str:
    said = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {said[0]}{line(error, path)}"


def _checked(found: object, source: str) -> Impl:
    if not isinstance(found, Impl):
        raise UnknownImplError(f"{source} must define IMPL, a sasa_bench.impls.Impl; found {type(found).__name__}")
    if not isinstance(found.name, str) or not NAME.fullmatch(found.name):
        raise UnknownImplError(f"{source}: its IMPL is called {found.name!r}: give one word, such as my_kernel")
    for field, kind in (("summary", str), ("op", Op), ("info", Info)):
        if not isinstance(getattr(found, field), kind):
            raise UnknownImplError(f"{source}: {field} of its IMPL is {getattr(found, field)!r}: give {kind.__name__}")
    return found
