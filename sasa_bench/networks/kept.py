"""What a module keeps between calls: tables of the sizes that it saw last, bounded by bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 16 << 20
"""What one module keeps at most. A table that is larger is made in every call."""

KEPT_ENTRIES = 16

FUNCTION_BYTES = KEPT_BYTES // 4
"""What a function counts as, since nobody can see what it holds."""


def is_traced(t: Tensor) -> bool:
    """Whether operations on `t` are recorded or transformed instead of only run: what they give must not be kept."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(t) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class Kept:
    """The values of functions (*arguments, like) by their arguments and the dtype and device of `like`.

    They go with the module that owns them; a copy and a pickle of the module begin with none. A value made while
    tracing is not kept, and one that is kept is an ordinary tensor, though it was made in inference mode. Threads may
    share it, as the replicas of nn.DataParallel do.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], Any] = {}
        self.lock = threading.Lock()

    def get(self, make: Callable[..., Any], like: Tensor, *arguments: Any) -> Any:
        """make(*arguments, like), kept or new."""
        if is_traced(like):
            return make(*arguments, like)
        key = (make, arguments, like.dtype, like.device)
        values = self.values
        found = values.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = make(*arguments, like)
            if _bytes(found) > KEPT_BYTES:
                return found
            with self.lock:
                values[key] = found
                while len(values) > KEPT_ENTRIES or sum(map(_bytes, values.values())) > KEPT_BYTES:
                    del values[next(iter(values))]
        return found

    @property
    def bytes(self) -> int:
        """What is kept now."""
        with self.lock:
            return sum(map(_bytes, self.values.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return FUNCTION_BYTES if callable(value) else 0
