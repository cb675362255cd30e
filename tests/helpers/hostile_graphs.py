"""Backbones that harm a machine that runs them: without end, with more memory than there is, and for hours.

They take images of 8 × 8 pixels, uint8 ``(N, 8, 8, 3)``, and say that they give float32 ``(N, 6)``. With `own` they
have the interface of a user's own file, which takes float32 ``(N, 3, 8, 8)``.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

SIZE, DIM = 8, 6


def _model(nodes: list[NodeProto], constants: dict[str, np.ndarray], own: bool) -> bytes:
    """Return a graph that adds the scalar ``harm``, which `nodes` compute from the scalar ``mean``, to a feature."""
    shape: list[int | str] = ["batch", 3, SIZE, SIZE] if own else ["batch", SIZE, SIZE, 3]
    kind = TensorProto.FLOAT if own else TensorProto.UINT8
    before = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "image"], ["means"], keepdims=0),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], keepdims=0),
    ]
    after = [
        helper.make_node("Unsqueeze", ["means", "image"], ["column"]),
        helper.make_node("Expand", ["column", "row"], ["features"]),
        helper.make_node("Add", ["features", "harm"], ["embeddings"]),
    ]
    constants = {"image": np.array([1, 2, 3]), "row": np.array([1, DIM]), **constants}
    after[0].input[1] = "last"
    constants["last"] = np.array([1])
    graph = helper.make_graph(
        [*before, *nodes, *after],
        "hostile",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def endless(own: bool = False) -> bytes:
    """Loop 2^62 times."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes on"]),
            helper.make_node("Mul", ["carried", "carried"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
    )
    loop = helper.make_node("Loop", ["often", "true", "mean"], ["harm"], body=body)
    return _model([loop], {"often": np.array(2**62), "true": np.array(True)}, own)


def huge(own: bool = False, gigabytes: int = 4000) -> bytes:
    """Expand a number to a tensor of many gigabytes."""
    nodes = [
        helper.make_node("Expand", ["mean", "shape"], ["tensor"]),
        helper.make_node("ReduceMean", ["tensor"], ["harm"], keepdims=0),
    ]
    return _model(nodes, {"shape": np.array([gigabytes, 250_000_000])}, own)


def slow(own: bool = False, products: int = 4000, side: int = 3000) -> bytes:
    """Multiply large matrices for hours, without a loop."""
    nodes = [helper.make_node("Expand", ["mean", "shape"], ["product 0"])]
    nodes += [
        helper.make_node("MatMul", [f"product {number}", f"product {number}"], [f"product {number + 1}"])
        for number in range(products)
    ]
    nodes.append(helper.make_node("ReduceMean", [f"product {products}"], ["harm"], keepdims=0))
    return _model(nodes, {"shape": np.array([side, side])}, own)


def multiplying(levels: int = 40) -> bytes:
    """Call a function that calls another twice, which calls another twice, …: a file of a few kilobytes."""
    opset = helper.make_opsetid("", 18)
    functions = [helper.make_function("own", "f0", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [opset])]
    for level in range(1, levels):
        twice = [helper.make_node(f"f{level - 1}", [a], [b], domain="own") for a, b in (("x", "z"), ("z", "y"))]
        both = [opset, helper.make_opsetid("own", 1)]
        functions.append(helper.make_function("own", f"f{level}", ["x"], ["y"], twice, both))
    model = onnx.load_from_string(_model([helper.make_node("Neg", ["mean"], ["harm"])], {}, own=True))
    call = next(node for node in model.graph.node if node.op_type == "Neg")
    call.op_type, call.domain = f"f{levels - 1}", "own"
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.extend(functions)
    return model.SerializeToString()
