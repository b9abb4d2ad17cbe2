"""What does local self-attention cost next to a convolution, and which implementation should I use?

`run` measures cases or suites in a worker process, as the command line does, and gives a table; `load` gives the table
of results files; `measure` times a function of your own in this process. `local_attention` makes an implementation, an
`Impl`, of a kernel; `LocalAttention2d` and `network` are torch modules that any implementation runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_bench.case import Case, UserError
    from sasa_bench.impls import Impl, local_attention
    from sasa_bench.library import run
    from sasa_bench.nn import LocalAttention2d, export, network
    from sasa_bench.report.table import load
    from sasa_bench.timing.sampling import Measurement, measure
    from sasa_bench.timing.settings import Settings

__all__ = [
    "Case",
    "Impl",
    "LocalAttention2d",
    "Measurement",
    "Settings",
    "UserError",
    "export",
    "load",
    "local_attention",
    "measure",
    "network",
    "run",
]

_MODULES = {
    "Case": "case",
    "Impl": "impls",
    "LocalAttention2d": "nn",
    "Measurement": "timing.sampling",
    "Settings": "timing.settings",
    "UserError": "case",
    "export": "nn",
    "load": "report.table",
    "local_attention": "impls",
    "measure": "timing.sampling",
    "network": "nn",
    "run": "library",
}


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and readers of results do without it.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
