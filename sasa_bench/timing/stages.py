"""Which stage of attention each operator belongs to, told from the data it touches; implementations know nothing of it.

Where inputs, parameters and results of a stage live is followed from operator to operator by the memory they lie in.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STAGES = ("project", "pad", "position", "logits", "softmax", "aggregate", "one operator", "convolution", "other")
"""pad also holds copies of keys and values; an operator that does several stages at once is `one operator`."""

PREFIX = "stage: "
"""What the name of a stage's range in a trace begins with."""

Roles = frozenset[str]
NOTHING: Roles = frozenset()
EMBEDDINGS = ("rel_row", "rel_col", "abs_row", "abs_col")
_FRESH = ("empty", "zeros", "ones", "full", "new_", "rand")
_SOFTMAX = ("exp", "amax", "max", "sub", "div", "logsumexp", "sum", "reciprocal")


class Stages(TorchDispatchMode):
    """Inside, every operator runs in a profiler range `stage: NAME`; `tensors` are inputs and parameters by name.

    An operator of a backward pass belongs to the stage of the forward operator whose gradient it computes. With
    `only_backward` the forward operators get no range.
    """

    def __init__(self, tensors: Mapping[str, Tensor], only_backward: bool = False) -> None:
        super().__init__()
        self.only_backward = only_backward
        self.roles: dict[int, Roles] = {}
        self.joint: dict[int, Tensor] = {}
        self.forward: dict[int, str] = {}
        for name, tensor in tensors.items():
            self._mark(tensor, frozenset({"r" if name in EMBEDDINGS else name}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` in the range of its stage and note what its outputs are."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        node = torch._C._current_autograd_node()
        name = func._schema.name.partition("::")[2]
        roles = NOTHING.union(*(self._roles(tensor) for tensor in inputs)) if inputs else NOTHING
        if node is not None:
            stage, made = self.forward.get(node._sequence_nr(), "other"), NOTHING
        else:
            stage, made = classify(name, roles)
            # The node of this operator was numbered before it runs; what it calls has no node and the same number.
            self.forward.setdefault(torch.autograd._get_sequence_nr() - 1, stage)
        with nullcontext() if node is None and self.only_backward else record_function(PREFIX + stage):
            outputs = func(*args, **kwargs)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                is_view = any(leaf.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in inputs)
                if not (is_view and func.is_view):
                    # A mask says where data lies and holds none of it.
                    self._mark(leaf, NOTHING if leaf.dtype == torch.bool else made)
        return outputs

    def _mark(self, tensor: Tensor, roles: Roles) -> None:
        place = tensor.untyped_storage().data_ptr()
        self.roles[place] = roles
        self.joint.pop(place, None)
        if roles == {"qkv"}:
            self.joint[place] = tensor

    def _roles(self, tensor: Tensor) -> Roles:
        """What a tensor is; a part of the joint projection is q, k or v by the channel it begins at."""
        place = tensor.untyped_storage().data_ptr()
        whole = self.joint.get(place)
        if whole is None or tensor.numel() >= whole.numel():
            return self.roles.get(place, NOTHING)
        channels = [d for d in range(whole.dim()) if whole.shape[d] % 3 == 0 and whole.shape[d] > 3]
        if whole.dim() != 4 or 1 not in channels:
            return frozenset({"q", "k", "v"})
        channel = tensor.storage_offset() // whole.stride(1) % whole.shape[1]
        return frozenset({"qkv"[3 * channel // whole.shape[1]]})


def classify(name: str, roles: Roles) -> tuple[str, Roles]:
    """(stage, what the output is) of an operator from its name without namespace and the roles of its inputs.

    Roles: x and w_qkv (input and weights), qkv (their product), q, k, v, r (embeddings), l (logits), a (softmax), y.
    """
    if name.startswith(_FRESH) or not roles:
        return "other", NOTHING
    if "weight" in roles:
        return "convolution", frozenset({"y"})
    if {"w_qkv", "r"} <= roles or ({"q", "k", "v"} <= roles and "a" not in roles) or {"x", "qkv"} <= roles:
        return "one operator", frozenset({"y"})
    if "w_qkv" in roles:
        return "project", frozenset({"qkv"} if "x" in roles else {"w_qkv"})
    if "x" in roles:
        return ("position" if "r" in roles else "project"), frozenset({"x"})
    if "softmax" in name:
        return "softmax", frozenset({"a"})
    if "a" in roles or "y" in roles:
        return "aggregate", frozenset({"a"} if roles == {"a"} else {"y"})
    if "r" in roles:
        return "position", frozenset({"l"} if "l" in roles else {"k"} if roles == {"r", "k"} else {"r"})
    if "l" in roles:
        by_hand = name.rstrip("_") in _SOFTMAX
        return ("softmax" if by_hand else "logits"), frozenset({"a"} if name.startswith("exp") and by_hand else {"l"})
    if {"q", "k"} <= roles:
        return "logits", frozenset({"l"})
    return "pad", roles
