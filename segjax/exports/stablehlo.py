"""Writes and runs StableHLO files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax import lax

from segjax import layers
from segjax.exports.format import LEAST, PLATFORMS, ExportFormat
from segjax.inference.engine import labels_of
from segjax.kernels import choice
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel

# ------------------------------------------------------------------------------------------------------------ StableHLO


def run_model(functional: FunctionalModel, params, batch_stats, images: jax.Array, *, form: ExportFormat) -> jax.Array:
    """What the file computes, on images as `form` has them but for (B, H, W, 3): logits (B, h, w, K) or labels."""
    if form.preprocessing:
        images = form.normalise(images)
    logits, _ = functional.bind(params, batch_stats)(images)
    if not form.argmax:
        return logits
    # 8 bits, as label images have them, where they are enough.
    kind = jnp.uint8 if functional.spec.num_classes <= 256 else jnp.int32
    return labels_of(layers.resize(logits, (images.shape[1], images.shape[2]))).astype(kind)


def write_stablehlo(path: Path, model: SegmentationModel, form: ExportFormat, metadata: dict[str, object]) -> None:
    """Writes the program and, beside it, what its outputs mean: a StableHLO file has no place for that."""
    functional = FunctionalModel(model)
    params, batch_stats = functional.arrays()
    params = {name: value.astype(form.dtype) for name, value in params.items()}

    def on(platform):
        def run(params, batch_stats, images):
            with choice.meant_for(platform):
                return run_model(functional, params, batch_stats, images, form=form)

        return run

    def images_to_output(images):
        # The forms that are fast on a CPU are not those of a GPU, and a file holds both.
        return lax.platform_dependent(params, batch_stats, images, **{name: on(name) for name in PLATFORMS})

    shape = (1, *form.size, 3)
    if form.dynamic and model.size_multiple > 1:
        shape = jax_export.symbolic_shape(f"batch, {model.size_multiple}*height, {model.size_multiple}*width, 3")
    elif form.dynamic:
        constraints = (f"height >= {LEAST}", f"width >= {LEAST}")
        shape = jax_export.symbolic_shape("batch, height, width, 3", constraints=constraints)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if form.preprocessing else jnp.float32)
    path.write_bytes(jax_export.export(jax.jit(images_to_output), platforms=PLATFORMS)(images).serialize())
    metadata_path(path).write_text(json.dumps(metadata, indent=1), encoding="utf-8")


def metadata_path(path: Path) -> Path:
    """The file of a StableHLO file's metadata, next to it."""
    return path.with_name(f"{path.name}.json")


def open_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    program = jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(program(images))
