"""Writes and runs ONNX files, from the PyTorch reference."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from segjax.exports import torch_program
from segjax.exports.format import ExportFormat
from segjax.models.segmentation_model import SegmentationModel


def require_onnx() -> None:
    """Raises ModuleNotFoundError for a package that `write_onnx` or `open_onnx` lacks."""
    import onnx
    import onnxruntime
    import onnxscript

    del onnx, onnxruntime, onnxscript


def write_onnx(path: Path, model: SegmentationModel, export_format: ExportFormat, metadata: dict[str, object]) -> None:
    """Writes one file, weights included; each entry of `metadata` is JSON in the file's own metadata."""
    import onnx

    with torch_program.quiet():
        program = torch.onnx.export(
            torch_program.traced(model, export_format),
            input_names=["images"],
            output_names=[export_format.output],
            dynamo=True,
            external_data=False,
            verbose=False,
            # The optimiser would store 16-bit weights as float32.
            optimize=export_format.dtype == "float32",
        )
    # torch.onnx.export returns None only without dynamo.
    assert program is not None
    proto = program.model_proto
    _name_sizes(proto, export_format)
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


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


def open_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images})[0])
