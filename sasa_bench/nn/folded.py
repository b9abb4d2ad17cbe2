"""Trained attention layers made ready for inference: weights packed once, batch norm and relu behind them folded in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sasa_bench.networks.attention import sines
from sasa_bench.networks.kept import is_traced
from sasa_bench.networks.stem import hooked
from sasa_bench.nn.layer import LocalAttention2d


class FoldedAttention2d(nn.Module):
    """An attention layer and the average pool, batch norm and relu behind it, each of them or None, as one module.

    x [B, C_in, H, W] -> y, channels last if x is. In eval mode and without gradients, an implementation that can packs
    the weights at the first call and again after a parameter has changed (but for changes through `.data`, which nobody
    can see), and applies norm and relu as it stores y; in every other case the modules run one after the other, also
    where the layer is of a subclass, whose methods may do something else.
    """

    def __init__(
        self, attention: LocalAttention2d, pool: nn.AvgPool2d | None, norm: nn.BatchNorm2d | None, relu: nn.ReLU | None
    ) -> None:
        super().__init__()
        self.attention, self.pool, self.norm, self.relu = attention, pool, norm, relu
        self._packed: tuple[Any, Callable[[Tensor], Tensor], list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> y."""
        whole = self._whole(x)
        if whole is None:
            y = self.attention(x)
            for module in (self.pool, self.norm, self.relu):
                y = y if module is None else module(y)
            return y
        if self.attention.position == "absolute":
            x = x + sines(self.attention.channels, x.shape[2], x.shape[3], x)
        y = whole(x)
        if self.pool is not None:
            y = self.pool(y)
            y = y if self.relu is None else self.relu(y)
        return y

    def _whole(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What computes all but the pool and what follows it, or None where the modules shall."""
        layer, norm = self.attention, self.norm
        if self.training or torch.is_grad_enabled() or is_traced(x):
            return None
        if x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
            return None
        if (layer.dropout and layer.training) or hooked(layer) or hooked(norm) or hooked(self.relu):
            return None
        if (
            type(layer) is not LocalAttention2d
            or not layer.one_product
            or layer.w_out is not None
            or layer.stride > 1
            or x.dtype != layer.w_qkv.dtype
            or x.dim() != 4
            or x.shape[1] != layer.channels
        ):
            return None
        core = layer.kernel(x).core
        if core is None or core.pack is None:
            return None
        used: list[Tensor | None] = [layer.w_qkv, layer.rel_row, layer.rel_col]
        if norm is not None:
            if norm.training or norm.running_mean is None:
                return None
            # torch counts no change of the statistics where it updates them, but that of the batches.
            used += [norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked]
        if any(t is not None and t.is_inference() for t in used):
            return None  # whether it changed cannot be known
        relu = self.relu is not None and self.pool is None
        options = (core, layer.scale, None if norm is None else norm.eps, relu)
        key = (*options, *(None if t is None else (t.data_ptr(), t._version, t.dtype) for t in used))
        if self._packed is None or self._packed[0] != key:
            w = layer.w_qkv if layer.scale == 1 else layer._scaled(layer.w_qkv)
            # What is held keeps its address: no other tensor can be taken for it.
            held = [t.detach() for t in used if t is not None]
            self._packed = key, core.pack(layer.window, w, layer.rel_row, layer.rel_col, norm, relu), held
        return self._packed[1]

    def train(self, mode: bool = True) -> FoldedAttention2d:
        """As nn.Module.train; what is packed is packed again afterwards."""
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode in which attention layers are folded with what stands behind them.

    In every nn.Sequential, a LocalAttention2d and the nn.AvgPool2d, nn.BatchNorm2d and nn.ReLU behind it, in this order
    and each only if it is there, become one FoldedAttention2d in the place of the layer; nn.Identity takes the places
    of the others. Elsewhere, such as in a forward method of your own, put a FoldedAttention2d where the layer is
    called. A graph that torch.compile freezes needs none of this: it is folded by itself.

    A layer of a subclass or with a parametrization stays as it is, and so does a module with hooks.
    """
    model = copy.deepcopy(model).eval()
    if type(model) is LocalAttention2d and not hooked(model):
        return FoldedAttention2d(model, None, None, None).eval()
    for chain in [m for m in model.modules() if type(m).forward is nn.Sequential.forward]:
        _fold_chain(chain)
    return model


BEHIND = (nn.AvgPool2d, nn.BatchNorm2d, nn.ReLU)


def _fold_chain(chain: nn.Module) -> None:
    children = list(chain._modules.items())  # named_children leaves out a module that stands there twice
    for at, (name, layer) in enumerate(children):
        if type(layer) is not LocalAttention2d or hooked(layer):
            continue
        found = _behind([module for _, module in children[at + 1 :]])
        pool, norm, relu = found
        setattr(chain, name, FoldedAttention2d(layer, pool, norm, relu).eval())
        count = sum(module is not None for module in found)
        for other, _ in children[at + 1 : at + 1 + count]:
            setattr(chain, other, nn.Identity())


def _behind(modules: Sequence[nn.Module | None]) -> list[Any]:
    """The pool, the norm and the relu that `modules` begin with, each or None."""
    rest = list(modules)
    found: list[nn.Module | None] = []
    for kind in BEHIND:
        first = rest[0] if rest else None
        fits = first is not None and type(first) is kind and not hooked(first)
        if isinstance(first, nn.AvgPool2d):
            fits = fits and first.padding in (0, (0, 0)) and first.divisor_override is None
        found.append(rest.pop(0) if fits else None)
    return found
