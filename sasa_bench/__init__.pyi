from .case import Case, UserError
from .impls import Impl, local_attention
from .library import run
from .nn import FoldedAttention2d, LocalAttention2d, export, fold, network
from .report.table import load
from .timing.sampling import Measurement, measure
from .timing.settings import Settings

__all__ = [
    "Case",
    "FoldedAttention2d",
    "Impl",
    "LocalAttention2d",
    "Measurement",
    "Settings",
    "UserError",
    "export",
    "fold",
    "load",
    "local_attention",
    "measure",
    "network",
    "run",
]
