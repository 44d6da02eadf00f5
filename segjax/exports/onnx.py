"""Writes ONNX files, from the PyTorch reference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from segjax.checkpoints.checkpoint import CheckpointError
from segjax.exports import float16, torch_program
from segjax.exports.format import OPSETS, ExportFormat
from segjax.inference.runtimes import import_onnxruntime, quiet_torch
from segjax.models.segmentation_model import SegmentationModel


def require_onnx() -> None:
    """Raises ModuleNotFoundError if a package to write ONNX files and to run them is missing."""
    require_writer()
    import_onnxruntime()


def require_writer() -> None:
    """Raises ModuleNotFoundError if a package to write ONNX files is missing."""
    import onnx
    import onnxscript

    del onnx, onnxscript


def write_onnx(path: Path, model: SegmentationModel, export_format: ExportFormat, metadata: dict[str, object]) -> None:
    """Writes one file with its weights. Each entry of `metadata` becomes JSON in the file's own metadata."""
    import onnx

    with quiet_torch():
        program = torch.onnx.export(
            torch_program.traced(model, export_format),
            input_names=["images"],
            output_names=[export_format.output],
            dynamo=True,
            external_data=False,
            verbose=False,
            # The optimiser would store 16-bit weights as float32.
            optimize=export_format.traced_dtype == "float32",
            # The exporter writes opset 18 and later.
            opset_version=None if export_format.opset is None else max(export_format.opset, 18),
        )
    # torch.onnx.export returns None only without dynamo.
    assert program is not None
    proto = program.model_proto
    if export_format.opset == 17:
        _lower_to_17(proto)
    if export_format.opset not in (None, opset_of(proto)):
        raise CheckpointError(
            f"opset {export_format.opset}: torch.onnx wrote {opset_of(proto)}, because an operation needs it; "
            f"choose {opset_of(proto)} or a later one"
        )
    # The oldest IR version that has the opset, because a runtime refuses newer ones.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    _name_sizes(proto, export_format)
    if (export_format.format, export_format.dtype) == ("onnx", "float16"):
        float16.convert(proto)
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        if export_format.opset is None:
            raise
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"opset {export_format.opset} cannot express this model ({reason}); choose from 18 to {OPSETS[-1]}"
        ) from None
    onnx.save(proto, path)


def opset_of(proto) -> int:
    """The version of ONNX's own operations in a model."""
    return next(entry.version for entry in proto.opset_import if not entry.domain)


_NOT_NEW = object()
# Attributes of the models' operations that are new in opset 18, and the value that equals the behaviour of opset 17.
_NEW_IN_18 = {
    ("Split", "num_outputs"): None,  # Any value: without sizes, 17 splits into equal parts for the outputs.
    ("Resize", "keep_aspect_ratio_policy"): b"stretch",
    ("Resize", "antialias"): 0,
    ("ReduceMean", "noop_with_empty_axes"): 0,
}


def _lower_to_17(proto) -> None:
    """Turns a model of opset 18 into one of opset 17. The checker then finds operations that 17 does not have."""
    import onnx

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    axes = set()
    for node in proto.graph.node:
        kept = []
        for attribute in node.attribute:
            same = _NEW_IN_18.get((node.op_type, attribute.name), _NOT_NEW)
            value = onnx.helper.get_attribute_value(attribute)
            if same is _NOT_NEW or same not in (None, value):
                kept.append(attribute)
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants:
            # In opset 18, the axes became an input.
            axes.add(name := node.input.pop())
            kept.append(onnx.helper.make_attribute("axes", onnx.numpy_helper.to_array(constants[name]).tolist()))
        del node.attribute[:]
        node.attribute.extend(kept)
    for name in axes.difference(name for node in proto.graph.node for name in node.input):
        proto.graph.initializer.remove(constants[name])
    for entry in proto.opset_import:
        if not entry.domain:
            entry.version = 17


def _name_sizes(proto, export_format: ExportFormat) -> None:
    """Renames the exporter's symbols of dynamic sizes to "batch", "height" and "width"."""
    (images,) = proto.graph.input
    batch, *sides = images.type.tensor_type.shape.dim
    sides = sides[:2] if export_format.channels_last else sides[1:]
    names = {
        dim.dim_param: name
        for dim, name in zip((batch, *sides), ("batch", "height", "width"), strict=True)
        if dim.dim_param
    }
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            for symbol, name in names.items():
                if dim.dim_param:
                    dim.dim_param = re.sub(rf"(?<!\w){re.escape(symbol)}(?!\w)", name, dim.dim_param)
