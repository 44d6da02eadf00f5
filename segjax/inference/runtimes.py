"""Opens exported files with the packages that run them: StableHLO, ONNX, OpenVINO, `torch.export` and LiteRT.

A package is imported when a file of its format is opened. All run on the CPU, in float32 where a package would choose
something else; StableHLO runs on the devices of jax. A file is a program: open only files from sources you trust.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np

from segjax.checkpoints.errors import CheckpointError
from segjax.runtime import memory, reading

ABOUT = "about.json"  # name of the metadata in a `.pt2`


class Runnable(NamedTuple):
    """An opened file.

    Attributes:
      outputs: Function from images to arrays by the name of the output.
      shape: Shape of the images, with None for sides of any size.
      dtype: Dtype of the images; float32 for images that the file quantises.
      metadata: Metadata in the file, as in `segjax.exports.export.file_metadata`; {} without.
      package: Name and version of the package.
    """

    outputs: Callable[[np.ndarray], dict[str, np.ndarray]]
    shape: tuple[int | None, ...]
    dtype: np.dtype
    metadata: Mapping[str, Any]
    package: str

    def run(self, images: np.ndarray) -> np.ndarray:
        """The output of a file that has only one."""
        (output,) = self.outputs(images).values()
        return output


class _Format(NamedTuple):
    name: str
    open: Callable[[Path], Runnable]
    package: str
    extra: str | None


def open_file(path: Path) -> Runnable:
    """Opens a file whose suffix is one of `SUFFIXES`.

    Raises:
      CheckpointError: The package is not installed, or cannot read the file.
      OSError: The file does not exist or may not be read.
    """
    form = SUFFIXES[path.suffix.lower()]
    try:
        reading.refuse_irregular(path)
        return form.open(path)
    except ImportError as error:
        remedy = f': pip install "segjax[{form.extra}]"' if form.extra else f" ({error})"
        raise CheckpointError(f"{path}: to run {form.name} needs the package {form.package}{remedy}") from None
    except CheckpointError:
        raise
    except reading.UnreadableError as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:
        # Every package has errors of its own. An OSError without a file comes from reading a damaged one.
        if memory.is_exhausted(error) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise CheckpointError(
            f"{path}: {form.package} cannot read it as {form.name} ({reading.stated(error)})"
        ) from None


def metadata_path(path: Path) -> Path:
    """The path of metadata next to a file, of formats that cannot contain it."""
    return path.with_name(f"{path.name}.json")


def files_of(path: Path) -> list[Path]:
    """An exported file, and the `.bin` next to an OpenVINO model, which has its weights."""
    weights = path.with_suffix(".bin")
    return [path, weights] if path.suffix.lower() == ".xml" and weights.is_file() else [path]


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the metadata of an exported file next to it, with the SHA-256 of the file."""
    content = {**metadata, "sha256": reading.sha256_of(files_of(path))}
    metadata_path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _only_input(inputs: Sequence[Any], path: Path) -> Any:
    if len(inputs) != 1:
        raise CheckpointError(f"{path}: takes {len(inputs)} inputs, and images are one; export it with one input")
    return inputs[0]


def _parsed(texts: Mapping[str, str]) -> dict[str, Any]:
    """The values that are JSON: other packages have entries of their own."""
    found = {}
    for key, text in texts.items():
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            continue
    return found


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


# ------------------------------------------------------------------------------------------------------------- formats

_OF_ONNX = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime, which reports nothing over the network.

    From 1.29 on, those for Linux and macOS report each session to Microsoft, with name and hash of the model.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def open_onnx(path: Path) -> Runnable:
    onnxruntime = import_onnxruntime()
    # Its fallback prints errors, and tries the same provider again.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], enable_fallback=0)
    images = _only_input(session.get_inputs(), path)
    names = [output.name for output in session.get_outputs()]
    kind = images.type.removeprefix("tensor(").removesuffix(")")
    return Runnable(
        lambda given: dict(zip(names, map(np.asarray, session.run(None, {images.name: given})), strict=True)),
        tuple(side if isinstance(side, int) else None for side in images.shape),
        np.dtype(_OF_ONNX.get(images.type, kind)),
        _parsed(session.get_modelmeta().custom_metadata_map),
        _version("onnxruntime"),
    )


def import_openvino() -> ModuleType:
    """The module openvino, which reports nothing over the network.

    Its telemetry reports every import from a forked process, and JAX has threads, with which a fork may deadlock. Where
    the package openvino_telemetry is missing, openvino does without.
    """
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))
    return importlib.import_module("openvino")


def open_openvino(path: Path) -> Runnable:
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(path)
    images = _only_input(model.inputs, path)
    # By default it computes in bfloat16 on processors that have it.
    program = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [_name_of(output, number) for number, output in enumerate(model.outputs)]
    shapes: set[tuple[int, ...]] = set()

    def outputs(given: np.ndarray) -> dict[str, np.ndarray]:
        if images.partial_shape.is_dynamic and given.shape not in shapes:
            # Raises for images that do not fit, such as those of other channels. The program may crash or compute
            # nonsense instead.
            model.clone().reshape(list(given.shape))
            shapes.add(given.shape)
        # Copied, because the next call reuses the memory.
        found = program(given)
        return {name: np.array(found[number]) for number, name in enumerate(names)}

    return Runnable(
        outputs,
        tuple(side.get_length() if side.is_static else None for side in images.partial_shape),
        np.dtype(images.element_type.to_dtype()),
        _metadata_of_openvino(model),
        _version("openvino"),
    )


def _name_of(output: Any, number: int) -> str:
    return output.any_name if output.names else f"output {number}"


def _metadata_of_openvino(model: Any) -> dict[str, Any]:
    """Entries of the metadata of an ONNX file, which OpenVINO's converter keeps under "framework"."""
    found = dict(model.rt_info).get("framework")
    entries = getattr(found, "value", found)
    if not isinstance(entries, Mapping):
        return {}
    return _parsed({key: str(getattr(value, "value", value)) for key, value in entries.items()})


def open_stablehlo(path: Path) -> Runnable:
    import jax
    from jax import export as jax_export

    exported = jax_export.deserialize(bytearray(reading.read_bytes(path)))
    images = _only_input(list(exported.in_avals), path)
    program = jax.jit(exported.call)

    def outputs(given: np.ndarray) -> dict[str, np.ndarray]:
        leaves = jax.tree.leaves(program(given))
        return {f"output {number}": np.asarray(leaf) for number, leaf in enumerate(leaves)}

    shape = tuple(side if isinstance(side, int) else None for side in images.shape)
    return Runnable(outputs, shape, np.dtype(images.dtype), {}, _version("jax"))


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Suppresses warnings and log messages of PyTorch's exporters, which include tracebacks."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def open_torch(path: Path) -> Runnable:
    import torch

    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise CheckpointError(f"{path}: is damaged: the CRC of {damaged} differs")
    extra: dict[str, Any] = {ABOUT: ""}
    with quiet_torch():
        program = torch.export.load(path, extra_files=extra)
    nodes = {node.name: node for node in program.graph.nodes}
    images = nodes[_only_input(list(program.graph_signature.user_inputs), path)].meta["val"]
    module = program.module()

    def outputs(given: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = module(torch.from_numpy(np.ascontiguousarray(given)))
        if not isinstance(found, Mapping):
            found = found if isinstance(found, tuple | list) else (found,)
            found = {f"output {number}": value for number, value in enumerate(found)}
        return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}

    return Runnable(
        outputs,
        tuple(side if isinstance(side, int) else None for side in images.shape),
        np.dtype(str(images.dtype).removeprefix("torch.")),
        reading.parse_json(extra[ABOUT], name=f"{path}: {ABOUT}") if extra[ABOUT] else {},
        _version("torch"),
    )


def open_tflite(path: Path) -> Runnable:
    try:
        module, package = importlib.import_module("ai_edge_litert.interpreter"), "ai-edge-litert"
    except ModuleNotFoundError:
        module, package = importlib.import_module("tflite_runtime.interpreter"), "tflite-runtime"
    interpreter = module.Interpreter(model_path=str(path))
    images = _only_input(interpreter.get_input_details(), path)
    quantised = _is_quantised(images)
    signature = images.get("shape_signature", images["shape"])

    def outputs(given: np.ndarray) -> dict[str, np.ndarray]:
        current = interpreter.get_input_details()[0]
        if tuple(current["shape"]) != given.shape:
            interpreter.resize_tensor_input(current["index"], given.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(current["index"], _quantised(given, images) if quantised else given)
        interpreter.invoke()
        found = interpreter.get_output_details()
        return {output["name"]: _dequantised(interpreter.get_tensor(output["index"]), output) for output in found}

    return Runnable(
        outputs,
        tuple(int(side) if side > 0 else None for side in signature),
        np.dtype("float32" if quantised else images["dtype"]),
        {},
        _version(package),
    )


def _is_quantised(details: Mapping[str, Any]) -> bool:
    """Whether the integers of a tensor stand for real numbers. Labels, and images from 0 to 255, have no scale."""
    return bool(details["quantization"][0])


def _quantised(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    kind = np.iinfo(details["dtype"])
    return np.clip(np.rint(values / scale) + zero, kind.min, kind.max).astype(details["dtype"])


def _dequantised(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    return (values.astype(np.float32) - zero) * np.float32(scale) if scale else values


# What runs a file, by its suffix.
SUFFIXES = {
    ".stablehlo": _Format("StableHLO", open_stablehlo, "jax", None),
    ".onnx": _Format("ONNX", open_onnx, "onnxruntime", "export"),
    ".xml": _Format("OpenVINO", open_openvino, "openvino", "openvino"),
    ".pt2": _Format("torch.export", open_torch, "torch", "export"),
    ".tflite": _Format("LiteRT", open_tflite, "ai-edge-litert", "tflite"),
}


def exported_path(source: object) -> Path | None:
    """The path of an exported file; None for all else. The `.bin` of an OpenVINO model stands for its `.xml`."""
    if not isinstance(source, str | Path) or str(source).startswith("hf:"):
        return None
    path = reading.user_path(source)
    if path.suffix.lower() == ".bin" and path.with_suffix(".xml").is_file():
        return path.with_suffix(".xml")
    return path if path.suffix.lower() in SUFFIXES and not path.is_dir() else None
