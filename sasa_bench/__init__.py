"""What does local self-attention cost next to a convolution, and which implementation should I use?

`run` measures cases or suites in a worker process, as the command line does, and gives a table; `load` gives the table
of results files; `measure` times a function of your own in this process. `local_attention` makes an implementation, an
`Impl`, of a kernel; `LocalAttention2d` and `network` are torch modules that any implementation runs.
"""

import ast
from importlib import import_module
from pathlib import Path

# Torch takes seconds to import, and readers of results do without it: the stub names what is imported on first use.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {name.name: part.module for part in _STUB.body if isinstance(part, ast.ImportFrom) for name in part.names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
