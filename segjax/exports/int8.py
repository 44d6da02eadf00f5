"""Quantises ONNX and OpenVINO files to INT8, with ranges of activations from images.

Quantised are convolutions, and products with a matrix of weights: weights with a scale for each output channel, their
inputs (in ONNX also their outputs) with one scale, between the smallest and the largest value on the images. All else
stays float32: norms, sums, upsampling, and products of two activations, as in attention and in the matrix decomposition
of SegNeXt's Hamburger, where errors would add up over its updates.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from segjax.inference.runtimes import import_onnxruntime, import_openvino

_OPERATIONS = ("Conv", "MatMul", "Gemm")
_OPENVINO_OPERATIONS = ("Convolution", "GroupConvolution", "MatMul")
# Node types of OpenVINO that compute nothing.
_NO_OPERATIONS = ("Constant", "Parameter", "Result")


def import_nncf() -> ModuleType:
    """The module nncf, which reports nothing over the network and logs errors only."""
    # It takes telemetry from the package that this keeps out.
    import_openvino()
    nncf = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf


def quantise(source: Path, target: Path, inputs: Sequence[np.ndarray]) -> str:
    """Writes the INT8 file of a float32 file.

    Args:
      source: `*.onnx`, or `*.xml` with images of a fixed size.
      target: File to write, in another folder.
      inputs: Inputs of the file, (B, H, W, C) or (B, C, H, W) as it takes them, for the ranges of activations.

    Returns:
      Name and version of the package that quantised.
    """
    if source.suffix == ".onnx":
        _quantise_onnx(source, target, inputs)
        return f"onnxruntime {version('onnxruntime')}"
    _quantise_openvino(source, target, inputs)
    return f"nncf {version('nncf')}"


def _quantise_onnx(source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    import_onnxruntime()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    proto = onnx.load(source)
    name = proto.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._remaining = iter(inputs)

        # None ends the calibration, which the annotation of the base class lacks.
        def get_next(self) -> Any:
            return next(({name: given} for given in self._remaining), None)

    # Shapes only. The exporter has optimised the graph, and onnxruntime's optimiser would turn each product with a bias
    # into a Gemm between two Reshapes.
    shaped = target.with_name("shaped.onnx")
    with _quiet():
        quant_pre_process(source, shaped, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            shaped,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_OPERATIONS),
            nodes_to_exclude=_float_products(onnx.load(shaped).graph),
        )
    shaped.unlink()
    quantised = onnx.load(target)
    del quantised.metadata_props[:]
    quantised.metadata_props.extend(proto.metadata_props)
    onnx.checker.check_model(quantised, full_check=True)
    onnx.save(quantised, target)


def _float_products(graph: Any) -> list[str]:
    """Names of the products in a graph of ONNX whose second factor is no matrix of weights."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in matrices]


def _quantise_openvino(source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    nncf, openvino = import_nncf(), import_openvino()
    model = openvino.Core().read_model(source)
    operations = model.get_ordered_ops()
    others = {operation.get_type_name() for operation in operations} - {*_OPENVINO_OPERATIONS, *_NO_OPERATIONS}
    float_products = [
        operation.get_friendly_name()
        for operation in operations
        if operation.get_type_name() == "MatMul" and not _has_matrix(operation)
    ]
    with _quiet():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(types=sorted(others), names=float_products, validate=False),
        )
        openvino.save_model(quantised, target, compress_to_fp16=False)


def _has_matrix(operation: Any) -> bool:
    """Whether one of the inputs of an operation of OpenVINO is a constant matrix."""
    sources = [entry.get_source_output() for entry in operation.inputs()]
    return any(
        source.get_node().get_type_name() == "Constant" and len(source.get_partial_shape()) == 2 for source in sources
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of nncf and the warnings of both packages off the terminal."""
    root, level = logging.getLogger(), logging.getLogger().level
    with contextlib.redirect_stdout(io.StringIO()):
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
