"""What operators cost by their input shapes: FLOPs (a multiply and an add are two) and the least traffic."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from typing import Any

ITEM_BYTES = {
    "double": 8,
    "long": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "bool": 1,
    "unsigned char": 1,
    "float16": 2,
    "int64": 8,
}
"""By the name of a dtype in a trace; 4 where a trace names none."""

Shape = Sequence[int]
Cost = tuple[float, float]
"""(FLOPs, bytes) of one call."""

_ELEMENTWISE = """add add_ sub sub_ mul mul_ div div_ relu relu_ gelu silu sigmoid tanh exp neg sqrt rsqrt clamp
masked_fill masked_fill_ threshold_backward copy_ Add Sub Mul Div Relu Gelu Sigmoid Tanh Exp Erf Sqrt Clip"""
_ROWWISE = """_softmax softmax log_softmax _log_softmax native_layer_norm layer_norm Softmax LayerNormalization"""
ELEMENTWISE, ROWWISE = frozenset(_ELEMENTWISE.split()), frozenset(_ROWWISE.split())
"""Operators that compute each value by itself, and those that compute it from its row."""


def cost(name: str, shapes: Sequence[Shape], dtypes: Sequence[str] = (), concrete: Sequence[Any] = ()) -> Cost | None:
    """The cost of one call of operator `name` of torch or ONNX; None where shapes do not tell.

    Bytes count each input once and the output once, each in its dtype. A convolution needs `concrete`, the text of each
    argument that is no tensor, for its stride, padding and dilation; an elementwise operator counts one FLOP for each
    value, a softmax or a normalization five.
    """
    base = name.rpartition("::")[2]
    tensors = [tuple(shape) for shape in shapes if shape]
    known = [ITEM_BYTES.get(kind) for kind in (*dtypes, *[""] * len(shapes))]
    item = next((size for size in known if size), 4)
    items = [size or item for size, shape in zip(known, shapes, strict=False) if shape]
    try:
        found = _of(base, tensors, concrete)
        if found is None:
            return None
        flops, read, written = found
        return flops, float(sum(prod(tensors[i]) * items[i] for i in read) + written * item)
    except (IndexError, ValueError, TypeError):
        return None


def _of(base: str, tensors: Sequence[Shape], concrete: Sequence[Any]) -> tuple[float, Sequence[int], int] | None:
    """(FLOPs, which tensors are read, values written)."""
    if base in ("mm", "bmm", "matmul", "MatMul", "FusedMatMul"):
        flops, written = _product(tensors[0], tensors[1])
        return flops, (0, 1), written
    if base in ("addmm", "baddbmm", "addmv", "_addmm_activation"):
        flops, written = _product(tensors[1], tensors[2])
        return flops, (0, 1, 2), written
    if base in ("linear", "mkldnn_linear", "_mkl_linear"):
        x, weight = tensors[0], tensors[1]
        rows = prod(x[:-1])
        return 2.0 * rows * prod(weight), (0, 1), rows * weight[0]
    if base == "Gemm":  # which side is transposed is not in the trace: the inner dimension is the shared one
        a, b = tensors[0], tensors[1]
        inner = a[1] if a[1] in b else a[0]
        rows, columns = prod(a) // inner, prod(b) // inner
        return 2.0 * rows * columns * inner, (0, 1), rows * columns
    if base in ("conv2d", "convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv1d", "conv3d"):
        convolution = _convolution(tensors[0], tensors[1], base, concrete)
        return convolution and (convolution[0], (0, 1), convolution[1])
    if base == "convolution_backward":
        return _convolution_backward(tensors[0], tensors[1], tensors[2], concrete)
    if "scaled_dot_product" in base and "backward" not in base:
        q, k, v = tensors[:3]
        pairs = prod(q[:-1]) * k[-2]
        return 2.0 * pairs * (q[-1] + v[-1]), range(len(tensors)), prod(q[:-1]) * v[-1]
    if base == "copy_":  # of the second into the first, which is not read
        return float(prod(tensors[0])), (1,), prod(tensors[0])
    if base in ELEMENTWISE and tensors:
        written = prod(_broadcast(tensors))
        return float(written), range(len(tensors)), written
    if base in ROWWISE and tensors:
        return 5.0 * prod(tensors[0]), (0,), prod(tensors[0])
    return None


def _broadcast(shapes: Sequence[Shape]) -> list[int]:
    """The shape that these have together: sizes from the right, each the one that is not 1."""
    rank = max(map(len, shapes))
    filled = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((size for size in sizes if size != 1), 1) for sizes in zip(*filled, strict=True)]


def _product(a: Shape, b: Shape) -> tuple[float, int]:
    """FLOPs and values of the product of matrices [..., M, K] and [..., K, N], batches broadcast; vectors [K]."""
    inner = a[-1]
    if (b[-2] if len(b) > 1 else b[0]) != inner:
        raise ValueError(f"{a} times {b}")
    rows = a[-2] if len(a) > 1 else 1
    columns = b[-1] if len(b) > 1 else 1
    written = prod(_broadcast([a[:-2], b[:-2]])) * rows * columns
    return 2.0 * written * inner, written


_PLACES = {
    "convolution": (3, 4, 5),
    "_convolution": (3, 4, 5),
    "mkldnn_convolution": (4, 3, 5),
    "cudnn_convolution": (3, 2, 4),
    "conv1d": (3, 4, 5),
    "conv2d": (3, 4, 5),
    "conv3d": (3, 4, 5),
}
"""Operator -> which arguments are stride, padding, dilation. cudnn_convolution and mkldnn_convolution pad first."""


def _convolution(x: Shape, weight: Shape, base: str, concrete: Sequence[Any]) -> tuple[float, int] | None:
    """x [B, C, ...], weight [O, C / groups, ...]; the FLOPs of every output value by the whole window, and values."""
    if base in ("convolution", "_convolution") and len(concrete) > 6 and str(concrete[6]).lower() == "true":
        return None  # transposed
    stride, padding, dilation = (_numbers(concrete[place], len(x) - 2) for place in _PLACES[base])
    if stride is None or padding is None or dilation is None:
        return None
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    values = x[0] * weight[0] * prod(out)
    return 2.0 * values * prod(weight[1:]), values


def _convolution_backward(
    gradient: Shape, x: Shape, weight: Shape, concrete: Sequence[Any]
) -> tuple[float, Sequence[int], int]:
    """The gradients of x and weight that the output mask asks for, each of the FLOPs of the forward pass."""
    transposed = str(concrete[7]).lower() == "true"
    of_x, of_weight, _ = (word == "true" for word in re.findall("true|false", str(concrete[10]).lower()))
    once = 2.0 * prod(x if transposed else gradient) * prod(weight[1:])
    read = (0, *[1] * of_weight, *[2] * of_x)
    return once * (of_x + of_weight), read, prod(x) * of_x + prod(weight) * of_weight


def _numbers(text: Any, count: int) -> list[int] | None:
    if not re.fullmatch(r"\[\s*-?\d+(\s*,\s*-?\d+)*\s*\]|\d+", str(text)):
        return None
    found = json.loads(str(text))
    found = found if isinstance(found, list) else [found]
    return found * count if len(found) == 1 else found
