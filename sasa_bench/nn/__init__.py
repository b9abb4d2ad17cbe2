"""Local self-attention and whole networks as torch modules for your own models, run by any implementation by name."""

from sasa_bench.nn.layer import LocalAttention2d, network
from sasa_bench.nn.to_onnx import ExportError, export

__all__ = ["ExportError", "LocalAttention2d", "export", "network"]
