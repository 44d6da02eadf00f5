"""Exports a model to one file that runs without segjax.

Input and output of a file:

    stablehlo         float32 (B, H, W, C), normalised -> `logits` float32 (B, H/4, W/4, K); SegNeXt's at 1/8
    others            float32 (B, C, H, W), normalised -> `logits` float32 (B, K, H/4, W/4)
    preprocessing     input of every format: (B, H, W, C), unscaled, in the dtype of the training images; uint8 for RGB
    argmax            output of every format: `labels` uint8 (B, H, W), int32 for more than 256 classes, from logits
                      upsampled bilinearly in float32 with the model's `align_corners`; the metadata contain
                      `align_corners` for users who upsample logits themselves

A StableHLO file is the model through `jax.export`, for CPUs and NVIDIA GPUs in one file. ONNX and torch files
(`torch.export`) come from the model's PyTorch reference in segjax.torch_reference, with the same weights, because no
converter from JAX to ONNX supports dynamic sizes; tests prove that model and reference are equal. OpenVINO files come
from the ONNX file. Every file is run and compared with the model before it is kept.

Weights are stored in `dtype`. A StableHLO program also computes in it, except norms, softmax and logits, and so does an
ONNX file in float16, except as `segjax.exports.float16` says; its input and logits stay float32. With bfloat16, ONNX
files compute in float32, as torch files do with both, because onnxruntime has no bfloat16 convolution on CPUs and
PyTorch has no float32 norms of bfloat16 inputs. OpenVINO stores float16 for any computation. INT8 is described in
`segjax.exports.int8`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from typing_extensions import TypedDict

from segjax import layers, models
from segjax.checkpoints import temperature as _temperature
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.load import LoadedCheckpoint, as_loaded
from segjax.checkpoints.state_dict import from_values, logger, named_variables
from segjax.data import specs, streets
from segjax.data.augment import normalise
from segjax.data.open import OpenSplit
from segjax.exports import calibration as calibrating
from segjax.exports import stablehlo
from segjax.exports.calibration import CalibrationData
from segjax.exports.format import BOUNDS, INT8_FORMATS, LEAST, OPSETS, SUFFIXES, ExportFormat
from segjax.inference.engine import Protocol, labels_of
from segjax.inference.runtimes import metadata_path, open_file
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic, console, memory
from segjax.runtime.reading import UnreadableError, checked, read_json, user_path

# ------------------------------------------------------------------------------------------------------ segjax's side


def rounded(model: SegmentationModel, *, stored: jnp.dtype, computes_in: jnp.dtype) -> SegmentationModel:
    """The model with its parameters rounded to `stored` and held in float32. Running statistics are not rounded."""
    spec = model.spec
    overrides: dict[str, Any] = dict(spec.overrides)
    abstract = nnx.eval_shape(
        lambda: models.create(spec.name, num_classes=spec.num_classes, dtype=computes_in, **overrides)
    )
    values = {}
    for path, variable in named_variables(model).items():
        value = np.asarray(variable.get_value())
        kept = value.astype(stored) if isinstance(variable, nnx.Param) else value
        values[path] = kept.astype(np.float32)
    return from_values(abstract, values)


def compiled(
    model: SegmentationModel, export_format: ExportFormat, batch: int, size: tuple[int, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that normalises images (batch, H, W, C) of `image_kind` and returns logits (batch, h, w, K).

    Raises:
      TooLittleMemoryError: The program needs more memory than there is.
    """
    height, width = size
    what = f"the model on {f'{batch} images' if batch > 1 else 'an image'} of {height}x{width}"
    # Float32 images; for labels also two copies of the scores at full size.
    scores = 2 * model.spec.num_classes if export_format.argmax else 0
    memory.refuse_more_than_host(4 * batch * height * width * (model.in_channels + scores), what=what)
    functional = FunctionalModel(model)

    @jax.jit
    def run(arrays, images):
        return export_format.scaled(functional.bind(*arrays)(export_format.normalise(images))[0])

    arrays = functional.arrays()
    with jax.default_matmul_precision("highest"):
        images = jax.ShapeDtypeStruct((batch, height, width, model.in_channels), _dtype_of_images(export_format))
        program = run.lower(arrays, images).compile()
    memory.refuse_too_large(memory.needed(program), jax.local_devices()[:1], what=what)
    return lambda images: np.asarray(program(arrays, images))


def _writer(export_format: ExportFormat) -> Callable:
    """`write(path, model, export_format, metadata)`, if all packages that write and run such a file are installed."""
    if export_format.format == "stablehlo":
        return stablehlo.write_stablehlo
    is_openvino = export_format.format == "openvino"
    try:
        from segjax.exports import int8, onnx, openvino, torch_program

        if export_format.format == "torch":
            return torch_program.write_torch
        if not is_openvino:
            onnx.require_onnx()
            return onnx.write_onnx
        openvino.require_openvino()
        if export_format.int8:
            int8.import_nncf()
        return openvino.write_openvino
    except ModuleNotFoundError as error:
        what = f"the format {export_format.format}{' with INT8' * export_format.int8}"
        extras = "export,openvino" if is_openvino else "export"
        raise CheckpointError(f"{what} needs {error.name}: pip install 'segjax[{extras}]'") from None


# ----------------------------------------------------------------------------------------------------------- comparison


def _dtype_of_images(export_format: ExportFormat) -> np.dtype:
    return np.dtype(export_format.image_kind.dtype or "float32")


def pictures(batch: int, size: tuple[int, int], export_format: ExportFormat) -> np.ndarray:
    """Generated street scenes as images of a model, (batch, H, W, C) of its dtype.

    Unless images are 8-bit RGB, channels repeat red, green and blue, each with its own mean and deviation.
    """
    scenes = np.stack([streets.scene(seed=0, index=46 + index, size=size)[0] for index in range(batch)])
    if export_format.image_kind.is_rgb:
        return scenes
    in_turn = np.asarray(normalise(scenes))[..., np.arange(export_format.image_kind.channels) % 3]
    values, dtype = (
        in_turn * np.array(export_format.std) + np.array(export_format.mean),
        _dtype_of_images(export_format),
    )
    return (values if dtype.kind == "f" else values.round().clip(0, np.iinfo(dtype).max)).astype(dtype)


def run_file(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, export_format: ExportFormat) -> np.ndarray:
    """The output of a file for images (B, H, W, C) from `pictures`: logits (B, h, w, K) or labels (B, H, W)."""
    given = images if export_format.preprocessing else np.asarray(export_format.normalise(images))
    output = run(given if export_format.channels_last else np.ascontiguousarray(np.moveaxis(given, -1, 1)))
    return output if export_format.argmax or export_format.format == "stablehlo" else np.moveaxis(output, 1, -1)


def upsampled(logits: np.ndarray, size: tuple[int, int], *, align_corners: bool) -> np.ndarray:
    return np.asarray(layers.resize(jnp.asarray(logits), size, align_corners=align_corners))


def error_of(
    output: np.ndarray,
    expected: np.ndarray,
    size: tuple[int, int],
    export_format: ExportFormat,
    *,
    align_corners: bool,
) -> float:
    """Largest error of a file's output against the model's logits (B, h, w, K), relative to the largest logit.

    For labels it is the largest difference, over pixels, between the model's highest score and its score of the file's
    label: if two classes differ only by rounding, either label is right.
    """
    largest = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    if not np.isfinite(largest):
        return np.inf
    if not export_format.argmax:
        if output.shape != expected.shape or not np.isfinite(output).all():
            return np.inf
        return float(np.abs(output.astype(np.float64) - expected).max()) / largest
    scores = upsampled(expected, size, align_corners=align_corners)
    if output.shape != scores.shape[:-1] or output.max() >= max(2, scores.shape[-1]):
        return np.inf
    if scores.shape[-1] == 1:
        # The threshold serves as the logit of the background.
        scores = np.concatenate([np.full_like(scores, export_format.least_logit), scores], axis=-1)
    given = np.take_along_axis(scores, output[..., None].astype(np.int64), axis=-1)[..., 0]
    return float((scores.max(axis=-1) - given).max()) / largest


def checked_sizes(export_format: ExportFormat, size_multiple: int) -> list[tuple[int, tuple[int, int]]]:
    """Batches and sizes at which to compare a file: its own, and for dynamic sizes others that are not square."""
    own = [(1, export_format.size)]
    if not export_format.dynamic:
        return own
    return own + ([(2, (67, 141)), (3, (98, 65))] if size_multiple == 1 else [(2, (64, 160)), (3, (96, 64))])


# ------------------------------------------------------------------------------------------------------------- the file


def file_metadata(loaded: LoadedCheckpoint, export_format: ExportFormat) -> dict[str, Any]:
    """Metadata of an exported file, for users who have only the file."""
    classes = loaded.classes
    metadata = {
        "model": loaded.model.spec.name,
        "dataset": classes.name,
        **({"guessed": True} if (loaded.metadata.get("dataset") or {}).get("guessed") else {}),
        # Names by label value.
        "classes": list(classes.label_names),
        "colors": [list(color) for color in classes.label_colors],
        "ignore_label": classes.ignore_label,
        "normalisation": {
            "mean": list(export_format.mean),
            "std": list(export_format.std),
            **_about_images(export_format.image_kind),
            "inside": export_format.preprocessing,
        },
        "size_multiple": loaded.model.size_multiple,
        "align_corners": loaded.model.align_corners,
        "input": "images",
        "output": export_format.output,
        # Applies to labels of models of one class.
        **({"threshold": export_format.threshold} if classes.num_classes == 1 and export_format.argmax else {}),
        # The logits have been divided by it.
        **({"temperature": export_format.temperature} if export_format.temperature != 1 else {}),
        "weights": export_format.weights,
    }
    return stamped(metadata)


class _Data(TypedDict):
    name: str
    eval_split: str


class _Config(TypedDict):
    data: _Data
    eval: dict[str, Any]


class _Result(TypedDict):
    step: int
    mean_iou: float | None


def _evaluated(metadata: Mapping[str, Any], source: object) -> dict[str, Any]:
    """{"evaluated": ...}, the mIoU of a run's checkpoint and how it was measured; {} where it is not known."""
    config, step, figure = (metadata.get(key) for key in ("config", "step", "mean_iou"))
    if config is None:
        return {}
    try:
        checked(config, _Config, name="config")
        protocol = Protocol.of(config["eval"]).record()
        if figure is None and isinstance(source, str | Path):
            # The best checkpoint has its own figure; that of the last is in the folder of the run.
            result = read_json(user_path(source) / "result.json", _Result)
            figure = result["mean_iou"] if result["step"] == step else None
    except (OSError, TypeError, ValueError):
        # Metadata of another version, or of an unfinished run; the export does not need it.
        return {}
    data = f"{config['data']['name']}:{config['data']['eval_split']}"
    known = {"mean_iou": figure, "step": step, "data": data, "protocol": protocol}
    return {} if figure is None else {"evaluated": known}


def _about_images(kind: specs.ImageKind) -> dict[str, Any]:
    """The kind of images to which mean and deviation apply."""
    if kind.is_rgb:
        return {"order": "RGB", "range": "0..255"}
    return {"channels": kind.channels, "dtype": kind.dtype or "unknown"}


def _shapes(export_format: ExportFormat, loaded: LoadedCheckpoint, logits: tuple[int, ...]) -> list[str]:
    """Lines to print, with names, dtypes and shapes of input and output."""
    batch, height, width = ("batch", "height", "width") if export_format.dynamic else (1, *export_format.size)
    shape = export_format.input_shape(batch, height, width)
    if export_format.argmax:
        given = (batch, height, width)
    else:
        stride = -(-export_format.size[0] // logits[1])
        h, w = (f"height/{stride}", f"width/{stride}") if export_format.dynamic else logits[1:3]
        given = (batch, h, w, logits[3]) if export_format.format == "stablehlo" else (batch, logits[3], h, w)
    normalised = "" if export_format.preprocessing else " normalised"
    kind = f"{export_format.input_dtype}{normalised}" + " RGB" * export_format.image_kind.is_rgb
    labels = "uint8" if loaded.model.spec.num_classes <= 256 else "int32"
    dtype = labels if export_format.argmax else "float32"
    multiple = loaded.model.size_multiple
    lines = [
        f"  in   images  {kind} ({', '.join(map(str, shape))})",
        f"  out  {export_format.output}  {dtype} ({', '.join(map(str, given))})",
    ]
    if export_format.dynamic:
        lines.append(f"  sides of {f'multiples of {multiple}' if multiple > 1 else f'at least {LEAST}'} pixels")
    classes = ", ".join(console.one_line(name, most=40) for name in loaded.classes.label_names)
    return [
        *lines,
        *textwrap.wrap(
            f"  classes of {console.one_line(loaded.classes.name)}: {classes}", 80, subsequent_indent="    "
        ),
    ]


def _require(export_format: ExportFormat, destination: Path, model: SegmentationModel) -> None:
    """Raises CheckpointError for a size or a destination that cannot be used; the message lists every problem."""
    height, width = export_format.size
    multiple = model.size_multiple
    nearest = [-(-side // multiple) * multiple for side in export_format.size]
    wrong = {
        f"size {height} {width}: sides must be at least 1": min(export_format.size) < 1,
        f"size {height} {width}: {model.spec.name} takes multiples of {multiple}: {nearest[0]} {nearest[1]}": (
            min(export_format.size) > 0 and list(export_format.size) != nearest
        ),
        f"size {height} {width}: dynamic sides must be at least {LEAST}": export_format.dynamic
        and min(export_format.size) < LEAST,
        f"{destination}: {export_format.format} files must end in {SUFFIXES[export_format.format]}": (
            destination.suffix != SUFFIXES[export_format.format]
        ),
        f"{destination} is a folder; choose another name": destination.is_dir(),
        f"opset applies only to ONNX files, not to {export_format.format}": (
            export_format.opset is not None and export_format.format != "onnx"
        ),
        f"{destination.with_suffix('.bin')} would be overwritten, and belongs to no {destination.name}: choose another "
        "name": (
            export_format.format == "openvino" and destination.with_suffix(".bin").exists() and not destination.exists()
        ),
        "OpenVINO files have weights of float32 or float16, not of bfloat16": (
            (export_format.format, export_format.dtype) == ("openvino", "bfloat16")
        ),
        f"INT8 is for files of {' and '.join(INT8_FORMATS)}, not of {export_format.format}": (
            export_format.int8 and export_format.format not in INT8_FORMATS
        ),
        f"INT8 is made from weights in float32; omit the dtype {export_format.dtype}": (
            export_format.int8 and export_format.dtype != "float32"
        ),
        "an INT8 file of OpenVINO has a fixed size; omit dynamic": (
            export_format.int8 and export_format.dynamic and export_format.format == "openvino"
        ),
        "a threshold is for labels of models of one class; omit it": (
            export_format.threshold != 0.5 and not (export_format.argmax and model.spec.num_classes == 1)
        ),
        f"opset {export_format.opset}: must be from {OPSETS[0]} to {OPSETS[-1]}": (
            export_format.opset is not None and export_format.opset not in OPSETS
        ),
    }
    if problems := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise CheckpointError("; ".join(problems))


class UnequalError(Exception):
    """Raised when the outputs of an exported file differ from the model's; the file is not kept."""


def export_model(
    source: str | Path | LoadedCheckpoint | SegmentationModel,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    preprocessing: bool = False,
    argmax: bool = False,
    dtype: str = "float32",
    int8: bool = False,
    calibration: str | os.PathLike[str] | OpenSplit | None = None,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    accept_loss: bool = False,
    opset: int | None = None,
    threshold: float = 0.5,
    temperature: float | str | None = None,
) -> None:
    """Export a model to one file that runs without segjax. It is kept only if its outputs equal the model's.

    Args:
      source: Argument or result of `segjax.load`, or a model.
      path: `*.stablehlo`, `*.onnx`, `*.xml` (OpenVINO) or `*.pt2` (`torch.export`); the suffix selects the format. All
        but the first need the extra `export`, OpenVINO also the extra `openvino`. The docstring of
        `segjax.exports.export` describes input and output of the file. The file contains classes and normalisation; for
        StableHLO, OpenVINO and INT8 they are in `FILE.json` next to it. The weights of `m.xml` are in `m.bin`.
      size: (height, width) of the images in pixels; by default the one that the checkpoint was evaluated at or trained
        on.
      dynamic: Whether batch, height and width are dynamic; otherwise the batch is 1.
      preprocessing: Whether the file normalises its images, (B, H, W, C), RGB of uint8 or in the dtype of the training
        images.
      argmax: Whether the output is labels of the images' size instead of logits.
      dtype: Dtype of the stored weights: "float32", "bfloat16" or "float16".
      int8: Whether to quantise the file, ONNX or OpenVINO, see `segjax.exports.int8`. mIoU, agreement, size and time
        before and after are logged, and kept in `FILE.json`.
      calibration: Images for the ranges of INT8: "NAME" or "NAME:SPLIT" or an open split, as `data` of
        `segjax.evaluate_dataset`, or a folder of images. At most 32 of them, and at most half, set the ranges; the
        others are measured on.
      data_source: As for `segjax.evaluate_dataset`.
      data_dir: As for `segjax.evaluate_dataset`.
      accept_loss: Whether to keep an INT8 file that loses more than a point of mIoU.
      opset: Opset of an ONNX file, from 17 to 25; by default that of torch.onnx.
      threshold: Probability above which a pixel belongs to the class, in labels of a model of one class.
      temperature: Divisor of the logits; "fitted" for the one that `segjax evaluate --fit-temperature` keeps with the
        checkpoint. By default 1.

    Raises:
      CheckpointError: No model can be read from `source`, or it cannot be exported with these settings; the message
        lists every reason.
      ValueError: The model does not take images of this size.
      UnequalError: The outputs of the file differ from the model's.
      LossError: The INT8 file loses more than a point of mIoU.

    Example:
      >>> import pathlib, tempfile
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.stablehlo"
      >>> segjax.export_model(model, path, size=(64, 96))
      >>> sorted(file.name for file in path.parent.iterdir())
      ['model.stablehlo', 'model.stablehlo.json']
    """
    path = user_path(path)
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    if path.suffix not in formats:
        raise CheckpointError(f"{path}: the suffix selects the format: {', '.join(formats)}")
    if dtype not in BOUNDS:
        raise CheckpointError(f"dtype is one of {', '.join(BOUNDS)}, not {dtype!r}")
    loaded = as_loaded(source)
    height, width = default_size(loaded) if size is None else size
    export_format = ExportFormat(
        formats[path.suffix],
        (height, width),
        dynamic=dynamic,
        preprocessing=preprocessing,
        argmax=argmax,
        dtype=dtype,
        int8=int8,
        opset=opset,
        threshold=threshold,
    )
    export(
        source,
        path,
        export_format,
        loaded=loaded,
        temperature=temperature,
        calibration=calibration,
        data_source=data_source,
        data_dir=data_dir,
        accept_loss=accept_loss,
    )


def default_size(loaded: LoadedCheckpoint[SegmentationModel]) -> tuple[int, int]:
    """Height and width at which a checkpoint was evaluated, or else of the crops that it was trained on.

    Raises:
      CheckpointError: It does not say.
    """
    metadata = loaded.metadata
    found = metadata.get("input_size") or (metadata.get("config") or {}).get("augment", {}).get("crop")
    if not found:
        raise CheckpointError("the checkpoint does not say at which size it is used; give the size (--size H W)")
    height, width = found
    return height, width


def export(
    source: str | Path | LoadedCheckpoint | SegmentationModel,
    destination: Path,
    export_format: ExportFormat,
    *,
    loaded: LoadedCheckpoint[SegmentationModel],
    temperature: float | str | None = None,
    calibration: str | os.PathLike[str] | OpenSplit | None = None,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    accept_loss: bool = False,
) -> None:
    """`export_model` with the settings of the file in one object, and the same errors.

    `loaded` is the checkpoint that was read from `source`.
    """
    logger.info("%s -> %s", source if isinstance(source, str | Path) else "model", destination)
    write = _writer(export_format)
    chosen = _temperature.chosen(temperature, loaded.metadata, source)
    if not 0 < chosen < np.inf:
        raise CheckpointError(f"a temperature is a positive number, not {chosen}")
    export_format = dataclasses.replace(
        export_format, mean=loaded.mean, std=loaded.std, image_kind=loaded.image_kind, temperature=chosen
    )
    _require(export_format, destination, loaded.model)
    data = _calibration_data(loaded, export_format, calibration, data_source=data_source, data_dir=data_dir)
    evaluated = _evaluated(loaded.metadata, source)
    model = rounded(
        loaded.model, stored=jnp.dtype(export_format.dtype), computes_in=jnp.dtype(export_format.computes_in)
    )
    # Traced before anything is compiled, to refuse at once a size that the model does not take.
    image = jax.ShapeDtypeStruct((1, *export_format.size, model.in_channels), jnp.float32)
    logits = jax.eval_shape(lambda image: model(image)[0], image).shape
    logger.info("%s, %d classes, weights in %s", model.spec.name, model.spec.num_classes, export_format.weights)
    logger.info("exporting as %s; large models take minutes", export_format.format)
    # Compiled before the export, to refuse programs at once that need too much memory.
    programs = [
        (batch, size, compiled(model, export_format, batch, size))
        for batch, size in checked_sizes(export_format, model.size_multiple)
    ]
    metadata = file_metadata(loaded, export_format) | evaluated
    with atomic.replacing_files(destination, stale=_own_metadata(destination)) as path:
        # An INT8 file is made of a float32 file.
        exact = path if data is None else path.parent / "float32" / path.name
        exact.parent.mkdir(exist_ok=True)
        try:
            # torch's error for a full disk does not state the reason.
            with atomic.naming(destination, path.parent):
                write(exact, model, export_format, metadata)
                is_equal = _is_equal(open_file(exact).run, loaded.model, model, export_format, programs)
        except Exception as error:
            # Neither jax nor torch has an error class for a program that depends on a size.
            is_known = isinstance(error, OSError | CheckpointError) or memory.is_exhausted(error)
            if is_known or not export_format.dynamic:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"the sizes of this model cannot be dynamic ({reason}); export it with a fixed size"
            ) from error
        if not is_equal:
            raise UnequalError("not written, because the outputs differ")
        if data is not None:
            with atomic.naming(destination, path.parent):
                settings = calibrating.settings_of(loaded, export_format)
                calibrating.quantise(exact, path, data, settings=settings, metadata=metadata, accept_loss=accept_loss)
            shutil.rmtree(exact.parent)
        written = [destination.with_name(file.name) for file in sorted(path.parent.iterdir())]
    for file in written:
        size = file.stat().st_size
        amount = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{-(-size // 2**10)} KiB"
        logger.info("wrote %s, %s", file, amount)
    for line in _shapes(export_format, loaded, logits):
        logger.info("%s", line)


def _calibration_data(
    loaded: LoadedCheckpoint[SegmentationModel],
    export_format: ExportFormat,
    data: str | os.PathLike[str] | OpenSplit | None,
    *,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> CalibrationData | None:
    """Opens the images for the ranges of INT8; None for another file."""
    if not export_format.int8:
        if data is not None or data_source is not None or data_dir is not None:
            raise CheckpointError("calibration data are for INT8; add it, or omit them")
        return None
    if data is None:
        raise CheckpointError("INT8 needs images for the ranges of its activations; give calibration data")
    found = calibrating.open_data(loaded, data, data_source=data_source, data_dir=data_dir)
    calibrating.refuse_larger(found, export_format)
    return found


def _own_metadata(path: Path) -> list[Path]:
    """The metadata next to an earlier file of this name, if segjax wrote them: they do not describe the next file."""
    place = metadata_path(path)
    try:
        is_own = "segjax_version" in read_json(place)
    except (OSError, UnreadableError):
        return []
    return [place] if is_own else []


def _is_equal(
    run: Callable,
    original: SegmentationModel,
    model: SegmentationModel,
    export_format: ExportFormat,
    programs: Sequence[tuple[int, tuple[int, int], Callable]],
) -> bool:
    """Whether file and model agree on street scenes. Logs the largest errors.

    Args:
      run: Function that runs the file.
      original: Model with its original weights.
      model: Model with rounded weights.
      export_format: Format of the file.
      programs: Batches and sizes at which to compare, each with the result of `compiled` for `model`.
    """
    logger.info("comparing the file with the model")
    bound, passed = export_format.bound, True
    for batch, size, expected in programs:
        images = pictures(batch, size, export_format)
        output = run_file(run, images, export_format)
        error = error_of(output, expected(images), size, export_format, align_corners=model.align_corners)
        verdict = "equal" if error <= bound else f"NOT equal (bound {bound:.0e})"
        where = f"{batch}x{size[0]}x{size[1]}"
        logger.info("  %-14s worst relative error of %s %.1e: %s", where, export_format.output, error, verdict)
        passed &= error <= bound
        if size == export_format.size and export_format.dtype != "float32":
            unrounded = rounded(original, stored=jnp.float32, computes_in=jnp.float32)
            exact = compiled(unrounded, export_format, batch, size)(images)
            ends = [
                scores
                if scores.ndim == 3
                else labels_of(
                    upsampled(scores, size, align_corners=model.align_corners), threshold=export_format.least_logit
                )
                for scores in (output, exact)
            ]
            share = float((np.asarray(ends[0]) == np.asarray(ends[1])).mean())
            logger.info("  %-14s %.2f%% of the labels equal those in float32", where, 100 * share)
    return passed
