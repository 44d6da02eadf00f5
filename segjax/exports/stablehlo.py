"""Writes StableHLO files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jax import lax

from segjax import layers
from segjax.exports.format import LEAST, PLATFORMS, ExportFormat
from segjax.inference.engine import Arrays, labels_of
from segjax.inference.runtimes import write_metadata
from segjax.kernels import choice
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel


def run_model(
    functional: FunctionalModel, params: Arrays, batch_stats: Arrays, images: jax.Array, *, export_format: ExportFormat
) -> jax.Array:
    """The computation in the file: images (B, H, W, C) -> logits (B, h, w, K), or labels (B, H, W)."""
    if export_format.preprocessing:
        images = export_format.normalise(images)
    logits = export_format.scaled(functional.bind(params, batch_stats)(images)[0])
    if not export_format.argmax:
        return logits
    # uint8 where it suffices, as in label images.
    kind = jnp.uint8 if functional.spec.num_classes <= 256 else jnp.int32
    size = images.shape[1], images.shape[2]
    scores = layers.resize(logits, size, align_corners=functional.align_corners)
    return labels_of(scores, threshold=export_format.least_logit).astype(kind)


def write_stablehlo(
    path: Path, model: SegmentationModel, export_format: ExportFormat, metadata: dict[str, object]
) -> None:
    """Writes the program and, in a file next to it, its metadata, which a StableHLO file cannot store."""
    functional = FunctionalModel(model)
    params, batch_stats = functional.arrays()
    params = {name: value.astype(export_format.dtype) for name, value in params.items()}

    def on(platform):
        def run(params, batch_stats, images):
            # Not the GPU's implementations: other versions may not understand their calls of cuDNN.
            with choice.meant_for("cpu" if platform == "cpu" else "plain"):
                return run_model(functional, params, batch_stats, images, export_format=export_format)

        return run

    def images_to_output(images):
        # A file contains two implementations, because those that are fast on a CPU are slow on a GPU.
        return lax.platform_dependent(params, batch_stats, images, **{name: on(name) for name in PLATFORMS})

    shape, channels = export_format.input_shape(1, *export_format.size), model.in_channels
    if export_format.dynamic and model.size_multiple > 1:
        multiple = model.size_multiple
        shape = jax_export.symbolic_shape(f"batch, {multiple}*height, {multiple}*width, {channels}")
    elif export_format.dynamic:
        constraints = (f"height >= {LEAST}", f"width >= {LEAST}")
        shape = jax_export.symbolic_shape(f"batch, height, width, {channels}", constraints=constraints)
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(export_format.input_dtype))
    with _without_locations():
        path.write_bytes(jax_export.export(jax.jit(images_to_output), platforms=PLATFORMS)(images).serialize())
    # A damaged program may run and give other labels; the hash shows it.
    write_metadata(path, metadata)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the source locations of operations, with folders of this machine, out of a program."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
