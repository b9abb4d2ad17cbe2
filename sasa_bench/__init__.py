"""What does local self-attention cost next to a convolution, and which implementation should I use?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_bench.attention import LocalAttention2d, network

__all__ = ["LocalAttention2d", "network"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and readers of results do without it.
    if name in __all__:
        from sasa_bench import attention

        return getattr(attention, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
