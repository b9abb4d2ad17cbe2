"""Local self-attention and whole networks as torch modules for your own models, run by any implementation by name."""

from __future__ import annotations

from typing import Any

from sasa_bench.nn.folded import FoldedAttention2d, fold
from sasa_bench.nn.layer import LocalAttention2d, network
from sasa_bench.nn.to_onnx import ExportError, export

__all__ = ["ExportError", "FoldedAttention2d", "LocalAttention2d", "export", "fold", "network", "saved_types"]


def saved_types() -> list[Any]:
    """What torch.load may find in a file of a module of torch and of this package: for safe_globals."""
    import torch
    from torch import nn

    from sasa_bench.networks import attention, build, core, kept, stem
    from sasa_bench.nn.stem import StemOf

    homes = (nn.modules, attention, build, stem, core, kept)
    own = [value for home in homes for value in vars(home).values() if isinstance(value, type)]
    return [*own, LocalAttention2d, FoldedAttention2d, StemOf, torch.nn.Parameter, torch.Size, set]
