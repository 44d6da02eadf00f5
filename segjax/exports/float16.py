"""Converts the graph of an ONNX file from float32 to float16.

Inputs and outputs keep their dtypes. The normalisation of the images, what follows the model (upsampling, argmax), and
the matrix decomposition of SegNeXt's Hamburger, whose sums over pixels may exceed the largest float16, stay float32.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

# Inputs that stay float32 in an operation of float16, by its type: `roi` and `scales`.
_ALWAYS_FLOAT32 = {"Resize": (1, 2)}


def scopes_of(node: Any) -> list[str]:
    """Modules of the PyTorch program that contain a node of ONNX, from the outermost; [] if that is unknown.

    The program itself is "". Nodes that the exporter's optimiser made may have none.
    """
    texts = {entry.key: entry.value for entry in node.metadata_props}
    # The last is the node itself.
    return ast.literal_eval(texts.get("pkg.torch.onnx.name_scopes", "[]"))[:-1]


def stays_float32(node: Any) -> bool:
    scopes = scopes_of(node)
    return bool(scopes) and (scopes[-1] == "" or scopes[-1].endswith(".hamburger"))


def convert(proto: Any) -> None:
    """Converts a model of ONNX, a `ModelProto` with the names of modules that torch.onnx writes.

    Args:
      proto: Model of float32, which is changed.
    """
    import onnx

    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    graph = proto.graph
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    floats = {
        value.name
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == float32
    }
    wide = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == float32}
    # Dtype in the new graph of each tensor that was float32, and the names of its copies in the other dtype.
    dtypes = dict.fromkeys((value.name for value in graph.input if value.name in floats), float32)
    copies: dict[tuple[str, int], str] = {}
    nodes, used = [], {}

    def as_dtype(name: str, dtype: int) -> str:
        """The name of a tensor in a dtype."""
        if name in wide:
            copies.setdefault((name, dtype), name if dtype == float32 else f"{name}.float16")
            used[copies[name, dtype]] = name, dtype
        elif dtypes[name] == dtype:
            return name
        elif (name, dtype) not in copies:
            copies[name, dtype] = f"{name}.float{16 if dtype == float16 else 32}"
            cast = onnx.helper.make_node("Cast", [name], [copies[name, dtype]], f"{copies[name, dtype]}.cast", to=dtype)
            nodes.append(cast)
        return copies[name, dtype]

    outputs = {value.name for value in graph.output if value.name in floats}
    for node in graph.node:
        dtype = float32 if stays_float32(node) else float16
        for place, name in enumerate(node.input):
            if name in wide or name in floats:
                is_wide = place in _ALWAYS_FLOAT32.get(node.op_type, ())
                node.input[place] = as_dtype(name, float32 if is_wide else dtype)
        for attribute in node.attribute if dtype == float16 else ():
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == float32:
                attribute.i = float16
            elif attribute.HasField("t") and attribute.t.data_type == float32:
                attribute.t.CopyFrom(_narrow(attribute.t, attribute.t.name))
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name not in floats:
                continue
            dtypes[name] = dtype
            if name in outputs and dtype == float16:
                # The output of the graph is float32, under the same name.
                node.output[place] = f"{name}.float16"
                copies[name, float16], dtypes[name] = node.output[place], float32
                nodes.append(onnx.helper.make_node("Cast", [node.output[place]], [name], f"{name}.cast", to=float32))
    kept = [tensor for tensor in graph.initializer if tensor.name not in wide]
    for name, (source, dtype) in used.items():
        kept.append(wide[source] if dtype == float32 else _narrow(wide[source], name))
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.value_info.extend(onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info)


def _narrow(tensor: Any, name: str) -> Any:
    """A tensor in float16; larger numbers become the largest."""
    import onnx

    largest = np.finfo(np.float16).max
    values = np.clip(onnx.numpy_helper.to_array(tensor), -largest, largest).astype(np.float16)
    return onnx.numpy_helper.from_array(values, name)
