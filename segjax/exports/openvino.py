"""Writes OpenVINO files, a pair of `.xml` and `.bin`, by its own reader of ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from segjax.exports import onnx as onnx_export
from segjax.exports.format import ExportFormat
from segjax.inference.runtimes import import_openvino, write_metadata
from segjax.models.segmentation_model import SegmentationModel


def require_openvino() -> None:
    """Raises ModuleNotFoundError if a package to write OpenVINO files is missing."""
    onnx_export.require_writer()
    import_openvino()


def write_openvino(
    path: Path, model: SegmentationModel, export_format: ExportFormat, metadata: dict[str, object]
) -> None:
    """Writes the `.xml`, the `.bin` with its weights, and the metadata in the `.json` next to them.

    OpenVINO stores float16 weights for a computation in the dtype of the device, so the graph is that of float32.
    """
    openvino = import_openvino()
    source = path.with_suffix(".onnx")
    onnx_export.write_onnx(source, model, dataclasses.replace(export_format, dtype="float32"), metadata)
    openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=export_format.dtype == "float16")
    source.unlink()
    write_metadata(path, metadata)
