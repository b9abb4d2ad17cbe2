"""Halo attention by the layer of timm: all pixels of a block attend to the block and a halo around it."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, Info, layers_only
from sasa_bench.ops.halo_attention import halo_block
from sasa_bench.ops.tensors import Call, Tensors

LAYERS = "sasa_bench_timm_layers"
"""The name under which the folder timm/layers is imported as a package."""


def _missing() -> str | None:
    return "timm is not installed: pip install --no-deps timm" if find_spec("timm") is None else None


@cache
def _halo_attn() -> Any:
    """timm.layers.halo_attn.HaloAttn without timm itself, which imports torchvision."""
    found = find_spec("timm")
    assert found is not None
    assert found.submodule_search_locations
    spec = ModuleSpec(LAYERS, None, is_package=True)
    spec.submodule_search_locations = [str(Path(next(iter(found.submodule_search_locations))) / "layers")]
    sys.modules[LAYERS] = module_from_spec(spec)
    return importlib.import_module(f"{LAYERS}.halo_attn").HaloAttn


def _build(case: Case, tensors: Tensors) -> Call:
    layer = _halo_attn()(
        case.channels,
        num_heads=case.heads,
        dim_head=case.head_dim,
        block_size=halo_block(case),
        halo_size=case.radius,
        device="meta",
    )
    for module, name, tensor in (
        (layer.q, "weight", "w_q"),
        (layer.kv, "weight", "w_kv"),
        (layer.pos_embed, "height_rel", "height_rel"),
        (layer.pos_embed, "width_rel", "width_rel"),
    ):
        assert getattr(module, name).shape == tensors[tensor].shape
        delattr(module, name)
        setattr(module, name, tensors[tensor])

    def call() -> Tensor:
        y: Tensor = layer(tensors["x"])
        return y

    return call


def _supports(case: Case) -> str | None:
    if reason := layers_only(case):
        return reason
    if case.scope != "layer":
        return "this is a layer with projections of its own: give scope = 'layer'"
    if case.position != "relative":
        return "HaloAttn always has relative positions: give position = 'relative'"
    return None


IMPL = Impl(
    name="halo_attention",
    op=ops.get("halo_attention"),
    summary="timm's HaloAttn: blocks of up to 8 x 8 pixels and a halo of K // 2 around each",
    build=_build,
    supports=_supports,
    missing=_missing,
    computes=lambda case: case.with_(border="zero"),
    info=Info(
        differs="all pixels of a block share one window, zero padding included, and logits are divided by sqrt(d)"
    ),
)
