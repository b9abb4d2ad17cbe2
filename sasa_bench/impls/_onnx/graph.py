"""What a graph holds: its nodes, the element types of torch as ONNX numbers them, and the FLOPs it asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnx


def element_types() -> dict[torch.dtype, int]:
    """torch dtype -> ONNX's number for it."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
    }


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def node_count(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of its subgraphs."""
    return sum(1 for _ in nodes_of(graph))


ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
REDUCTIONS = ("ReduceSum", "ReduceMean")


def graph_flops(model: onnx.ModelProto) -> int:
    """Operations that a graph of one size asks for, in the convention of the cost model.

    A multiply and an add are two; softmax, comparisons, copies, and work on integers count nothing. MatMul of
    [.., M, K] and [.., K, N]: 2 M K N each; Conv: 2 for each weight of a filter and output scalar; an elementwise
    operation: 1 for each output scalar; a sum: 1 for each input scalar. Nodes that depend on constants alone count
    nothing. Raises ValueError for a shape that is not known, or for an operator that multiplies and has no rule here.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = inferred.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    floating = {t.name for t in graph.initializer if t.data_type in element_types().values()}
    constant = {t.name for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        if kind.elem_type in element_types().values():
            floating.add(value.name)

    def size(name: str) -> int:
        if name not in shapes or -1 in shapes[name]:
            raise ValueError(f"the shape of {name!r} is not known: count the FLOPs of a model of one size")
        return math.prod(shapes[name])

    total = 0
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant |= set(node.output)
        elif node.op_type in ("MatMul", "Conv"):
            first, second = node.input[:2]
            size(first)
            depth = shapes[first][-1] if node.op_type == "MatMul" else math.prod(shapes[second][1:])
            total += 2 * depth * size(node.output[0])
        elif node.op_type in ("Gemm", "Einsum", "Attention", "ConvTranspose"):
            raise ValueError(f"no rule for the FLOPs of {node.op_type}: add one to graph_flops")
        elif node.output[0] in floating and node.op_type in ELEMENTWISE:
            total += size(node.output[0])
        elif node.output[0] in floating and node.op_type in REDUCTIONS:
            total += size(node.input[0])
    return total
