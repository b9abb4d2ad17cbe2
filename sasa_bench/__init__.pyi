from .case import Case, UserError
from .impls import Impl, local_attention
from .library import run
from .nn import LocalAttention2d, export, network
from .report.table import load
from .timing.sampling import Measurement, measure
from .timing.settings import Settings

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
