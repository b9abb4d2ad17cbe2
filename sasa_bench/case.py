"""One point of a sweep: every field is an axis."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

Resolution = int | str


class UserError(ValueError):
    """An error that a user can cause and mend; the message states what was given, what is allowed and how to fix it."""


class CaseError(UserError):
    """A value that no case can have."""


def closest(word: object, known: Iterable[str]) -> str:
    """For a message on an unknown word: "do you mean 'fused'? " where a known one is close to it, else ""."""
    like = difflib.get_close_matches(str(word), known, 1)
    return f"do you mean {like[0]!r}? " if like else ""


CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("layer", "core", "network"),
    "position": ("none", "absolute", "relative", "relative_only"),
    "border": ("mask", "zero"),
    "dtype": ("float32", "tf32", "bfloat16", "float16"),
    "device": ("cpu", "cuda"),
    "mode": ("forward", "backward", "training"),
    "network": ("none", "resnet26", "resnet38", "resnet50", "retinanet26", "retinanet38", "retinanet50"),
    "stem": ("none", "conv", "stand_alone", "conv_values", "aware_values"),
    "memory_format": ("contiguous", "channels_last"),
}
"""The allowed values of each axis that names a choice."""

GROUPS = ("none", *("".join(g) for n in (1, 2, 3, 4) for g in itertools.combinations("1234", n)))
"""Which groups of a network can use attention; a RetinaNet adds "+heads" for its pyramid and heads."""

STEM_HEADS = 4
"""Heads of an attention stem."""

NARROWEST = 64
"""Channels of attention in the first group of a network."""

DTYPE_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, whoever implements it.

    scope             layer: x -> y with the q, k, v projections; core: q, k, v -> y; network: a whole model
    kernel_size       K, the side of the window in pixels; odd
    channels          C, input and output channels
    heads             N; each head has d = C / N channels and a softmax of its own
    resolution        the map in pixels: 28 for 28 x 28, "28x56" for height 28 and width 56
    batch             B, images a call
    position          none; absolute: embeddings added to the input; relative: q . r added to the logits;
                      relative_only: q . r are the logits, at scope "network"
    border            mask: pixels outside the image take no part in the softmax; zero: they do, with k = v = 0
    dtype             of every tensor; tf32: float32 tensors whose products tensor cores may round to 10 bits
    device            cpu or cuda
    mode              forward; backward alone; training = forward + backward, gradients of input and parameters
    threads           CPU threads; 0 asks for every core the process may use
    network           the model at scope "network", else "none"; its widths are its own, not `channels`
    stem              of a network: conv, or attention in 4 x 4 blocks with stand_alone, conv_values or aware_values;
                      at scope "layer" such a stem alone instead of a layer, from an image of 3 colours to C channels at
                      a quarter of the resolution, whose 4 heads and relative positions are its own
    attention_groups  which of its groups use attention, such as "34", or "none"; "1234+heads" adds the pyramid and
                      heads of a RetinaNet
    memory_format     how images [B, C, H, W] and convolution weights lie in memory: contiguous (NCHW) or channels_last
                      (NHWC), as torch.channels_last; an output may have either

    Raises CaseError for a value outside its axis.
    """

    scope: str = "layer"
    kernel_size: int = 7
    channels: int = 128
    heads: int = 8
    resolution: Resolution = 28
    batch: int = 2
    position: str = "relative"
    border: str = "mask"
    dtype: str = "float32"
    device: str = "cpu"
    mode: str = "forward"
    threads: int = 0
    network: str = "none"
    stem: str = "none"
    attention_groups: str = "none"
    memory_format: str = "contiguous"

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", canonical_resolution(self.resolution))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise CaseError(f"{name} = {value!r}: {closest(value, allowed)}give one of {', '.join(allowed)}")
        for name, least in (("kernel_size", 1), ("channels", 1), ("heads", 1), ("batch", 1), ("threads", 0)):
            value = _whole(getattr(self, name))
            object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CaseError(f"{name} = {value!r}: give a whole number, {least} or more")
            if value > MOST:
                raise CaseError(f"{name} = {value:.3g}: give a whole number, at most {MOST}")
        if self.kernel_size % 2 == 0:
            raise CaseError(
                f"kernel_size = {self.kernel_size} is even, and a window needs a middle pixel: "
                f"give an odd number such as {self.kernel_size - 1} or {self.kernel_size + 1}"
            )
        if self.scope != "network" and self.channels % self.heads:
            divisors = [str(n) for n in range(1, self.channels + 1) if self.channels % n == 0]
            raise CaseError(
                f"channels = {self.channels} do not split into heads = {self.heads}: "
                f"give a number of heads that divides it ({', '.join(divisors)})"
            )
        if (self.network == "none") == (self.scope == "network"):
            raise CaseError(
                f"scope = {self.scope!r} with network = {self.network!r}: "
                "give scope = 'network' and a network, or neither"
            )
        self._check_network()

    def _check_network(self) -> None:
        groups_named = _whole(self.attention_groups)
        if isinstance(groups_named, int) and not isinstance(groups_named, bool):  # 34 in a TOML file
            object.__setattr__(self, "attention_groups", str(groups_named))
        elif not isinstance(groups_named, str):
            raise CaseError(f"attention_groups = {groups_named!r}: give a text such as '1234', '34' or 'none'")
        groups, plus, parts = self.attention_groups.partition("+")
        heads_too = self.network.startswith("retinanet")
        if groups not in GROUPS or (plus and not (heads_too and parts == "heads")):
            example = "1234, 34, none, or 1234+heads" if heads_too else "1234, 34 or none"
            raise CaseError(
                f"attention_groups = {self.attention_groups!r} of network {self.network!r}: "
                f"name groups out of 1234 in ascending order, such as {example}"
            )
        if self.scope != "network":
            if self.attention_groups != "none":
                raise CaseError(
                    f"attention_groups = {self.attention_groups!r} at scope {self.scope!r}: only a network has them; "
                    "give 'none'"
                )
            self._check_stem()
            if self.position == "relative_only":
                raise CaseError(
                    f"position = 'relative_only' at scope {self.scope!r}: only a network has it; "
                    "give none, absolute or relative"
                )
            return
        if self.stem == "none":
            stems = ", ".join(CHOICES["stem"][1:])
            raise CaseError(f"network = {self.network!r} without a stem: give stem = one of {stems}")
        if self.attention_groups != "none" and NARROWEST % self.heads:
            divisors = ", ".join(str(n) for n in range(1, NARROWEST + 1) if NARROWEST % n == 0)
            raise CaseError(
                f"heads = {self.heads} do not split the {NARROWEST} channels of group 1 of a network: "
                f"give one of {divisors}"
            )

    def _check_stem(self) -> None:
        if self.stem == "none":
            return
        if self.scope == "core":
            raise CaseError(
                f"stem = {self.stem!r} at scope 'core': a stem is measured at scope 'layer' or in a network"
            )
        if self.stem != "conv" and self.channels % STEM_HEADS:
            near = max(1, self.channels // STEM_HEADS) * STEM_HEADS
            raise CaseError(
                f"channels = {self.channels} with stem = {self.stem!r}: give a multiple of its {STEM_HEADS} heads, "
                f"such as {near}"
            )

    @property
    def height(self) -> int:
        """Rows of the map, pixels."""
        return _sides(self.resolution)[0]

    @property
    def width(self) -> int:
        """Columns of the map, pixels."""
        return _sides(self.resolution)[1]

    @property
    def radius(self) -> int:
        """Pixels from the middle of the window to its edge."""
        return self.kernel_size // 2

    @property
    def head_dim(self) -> int:
        """d, channels a head."""
        return self.channels // self.heads

    @property
    def has_attention(self) -> bool:
        """Whether attention is a part of it: a network may have none in its groups and in its stem."""
        if self.scope == "network":
            return self.attention_groups != "none" or self.stem not in ("none", "conv")
        return self.stem != "conv"

    def to_dict(self) -> dict[str, Any]:
        """Field -> plain value, as stored in a results file."""
        return {name: getattr(self, name) for name in AXES}

    def with_(self, **changes: Any) -> Case:
        """A copy with some fields changed; raises CaseError as the constructor does."""
        return replace(self, **changes)

    def describe(self, without: Mapping[str, Any] | None = None) -> str:
        """The fields that differ from the defaults (or from `without`), as `name=value` words."""
        plain = {f.name: f.default for f in fields(self)} | dict(without or {})
        words = [f"{name}={value}" for name, value in self.to_dict().items() if value != plain[name]]
        return " ".join(words) or "the default case"


AXES: tuple[str, ...] = tuple(f.name for f in fields(Case))
"""Every axis of a sweep, in the order of the table's columns."""

_TYPES = {f.name: (int if f.type == "int" else str) for f in fields(Case)}


def from_dict(values: Mapping[str, Any]) -> Case:
    """The case with these fields; absent ones keep their default. Raises CaseError for an unknown field."""
    for name in values:
        if name not in AXES:
            raise CaseError(f"unknown axis {name!r}: {closest(name, AXES)}the axes are {', '.join(AXES)}")
    return Case(**values)


def parse_value(name: str, text: str) -> Any:
    """The value of axis `name` written as `text` on a command line. Raises CaseError."""
    if name not in AXES:
        raise CaseError(f"unknown axis {name!r}: {closest(name, AXES)}the axes are {', '.join(AXES)}")
    if name == "resolution":
        return canonical_resolution(text)
    if _TYPES[name] is int:
        try:
            return int(text)
        except ValueError:
            raise CaseError(f"{name} = {text!r}: give a whole number") from None
    return text


def canonical_resolution(value: Any) -> Resolution:
    """28, "28", "28x28" and [28, 28] -> 28; "28x56" and [28, 56] -> "28x56". Raises CaseError."""
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        if isinstance(value, (list, tuple)):
            sides = [operator.index(side) for side in value]
        else:
            sides = [int(side) for side in str(value).split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
        if min(height, width) < 1 or max(height, width) > MOST:
            raise ValueError
    except (TypeError, ValueError):
        raise CaseError(
            f"resolution = {value!r}: give a side in pixels (28) or height x width (28x56), each from 1 to {MOST}"
        ) from None
    return height if height == width else f"{height}x{width}"


MOST = 1 << 20
"""No count of a case is larger: nothing that could be measured is, and products of them stay numbers."""


def _whole(value: Any) -> Any:
    """A whole number of NumPy or pandas as Python's own; anything else as it is."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _sides(resolution: Resolution) -> tuple[int, int]:
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution.split("x")
    return int(height), int(width)
