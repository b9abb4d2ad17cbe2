"""Local self-attention and whole networks as torch modules for your own models, run by any implementation by name."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

from sasa_bench import impls
from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.impls import Impl
from sasa_bench.networks import describe, image_shape, layers
from sasa_bench.networks.attention import WindowAttention
from sasa_bench.networks.build import build


class LocalAttention2d(WindowAttention):
    """Stand-alone self-attention of Ramachandran et al. 2019 (arXiv 1906.05909, equation 3) over K x K windows.

    y_ij = sum over ab in the window of softmax_ab(q_ij . k_ab + q_ij . r_{a-i,b-j}) v_ab, for each of N heads of
    d = C / N channels; no 1 / sqrt(d), no bias, no projection of the output.

    x [B, channels, H, W] -> y [B, C, H, W] in the dtype and on the device of x, for maps of any size.

    channels      of x
    kernel_size   K, side of the window in pixels; odd
    heads         N; divides the output channels
    position      none; absolute: sines of row and column added to x; relative: r = (row, column) embeddings of d / 2
                  channels each; relative_only: q . r alone are the logits
    border        mask: pixels outside the map take no part in the softmax; zero: they do, with k = v = 0
    impl          the implementation that runs it, by name; see `sasa-bench list`
    out_channels  C; as many as `channels` when None

    Parameters: w_qkv [3 C, channels] (rows of q, k, v; of q, v with relative_only); with relative positions rel_row
    [N, d // 2, K] and rel_col [N, d - d // 2, K]. They do not depend on `impl`, and `impl` may be changed at any time.

    Raises ValueError for a value outside its choices and for an input of another shape or dtype than said here;
    RuntimeError, at the first call, where the implementation cannot run this on this machine.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        heads: int = 8,
        position: str = "relative",
        border: str = "mask",
        impl: str = impls.ANYWHERE,
        out_channels: int | None = None,
    ) -> None:
        Case(
            kernel_size=kernel_size,
            channels=channels if out_channels is None else out_channels,
            heads=heads,
            position="relative" if position == "relative_only" else position,
            border=border,
        )
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels = {channels!r}: give a whole number, 1 or more")
        _attending(impl)
        super().__init__(channels, kernel_size, heads, position, border, out_channels)
        self.impl = impl

    def kernel(self) -> Impl:
        """The implementation that runs the attention."""
        return _attending(self.impl)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> y [B, C, H, W]."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {list(x.shape)}: give [batch, {self.channels}, height, width]")
        name = str(x.dtype).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise ValueError(f"x has dtype {name}: give {', '.join(DTYPE_BYTES)}")
        if x.dtype != self.w_qkv.dtype:
            have = str(self.w_qkv.dtype).removeprefix("torch.")
            raise ValueError(f"x has dtype {name} and the parameters {have}: convert one, such as module.to(x.dtype)")
        return super().forward(x)

    def extra_repr(self) -> str:
        out = "" if self.out_channels == self.channels else f", out_channels={self.out_channels}"
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, heads={self.heads}, position={self.position!r}, "
            f"border={self.border!r}, impl={self.impl!r}{out}"
        )


def network(
    name: str,
    stem: str = "conv",
    attention_groups: str = "1234",
    kernel_size: int = 7,
    heads: int = 8,
    position: str = "relative",
    border: str = "mask",
    impl: str = impls.ANYWHERE,
) -> nn.Module:
    """A network of the paper: x [B, 3, H, W] -> scores [B, 1000], or of a RetinaNet [B, A, 95].

    The arguments are the axes of a case at scope "network" and the implementation that runs the attention. A state dict
    of one fits the same network with any other implementation. An odd number of pixels halves upwards.

    Raises CaseError for a value outside its axis and UnknownImplError for an unknown implementation.
    """
    case = Case(
        scope="network",
        network=name,
        stem=stem,
        attention_groups=attention_groups,
        kernel_size=kernel_size,
        heads=heads,
        position=position,
        border=border,
    )

    def make(layer: layers.Attention, channels: int) -> LocalAttention2d:
        return LocalAttention2d(
            channels, layer.kernel_size, layer.heads, layer.position, layer.border, impl, layer.channels or None
        )

    return build(describe(case), image_shape(case), make)


@lru_cache
def _attending(name: str) -> Impl:
    impl = impls.get(name)
    if impl.attend is None and impl.layer is None:
        known = [n for n in impls.BUILTIN if n != name and _has_attend(n)]
        raise ValueError(f"implementation {name!r} computes no local attention inside a model: give {', '.join(known)}")
    return impl


def _has_attend(name: str) -> bool:
    try:
        return impls.get(name).attend is not None
    except ImportError:
        return False
