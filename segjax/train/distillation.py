"""The teacher of a run: a trained model, of any family, whose logits the model learns to reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from segjax import layers, losses
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint, load
from segjax.checkpoints.selection import CHOOSE
from segjax.data import specs
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import console
from segjax.train.config import RunError


class Teacher:
    """A model in evaluation mode, as a function of its arrays, which a training state holds next to the student's.

    Attributes:
      divergence: Loss between the logits of student and teacher.
    """

    def __init__(
        self,
        model: SegmentationModel,
        divergence: losses.Divergence,
        *,
        scale: np.ndarray | float = 1.0,
        shift: np.ndarray | float = 0.0,
    ):
        """Splits the model into a function and its arrays.

        Args:
          model: Model of the teacher.
          divergence: Loss between the logits.
          scale, shift: The teacher's images are scale * the student's + shift, a number for each channel.
        """
        self.divergence = divergence
        self._scale, self._shift = scale, shift
        # On the host, so that devices hold them once, in the state.
        self._params, self._batch_stats = jax.device_get(FunctionalModel(model).arrays())
        graph, params, batch_stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (params, batch_stats))
        self._model = FunctionalModel(nnx.merge(graph, *shapes, rest))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The parameters and running statistics, which no step changes.

        They are not a dict by name, because every dict of a state is searched for the student's stacked parameters.
        """
        return (*self._params.values(), *self._batch_stats.values())

    def metadata(self, source: str) -> dict[str, str]:
        """Metadata for checkpoints of a run: source, name, and SHA-256 of the weights."""
        digits = params_sha256(self._params | self._batch_stats)
        return {"source": source, "model": self._model.spec.name, "sha256": digits}

    def total(
        self,
        arrays: tuple[jax.Array | np.ndarray, ...],
        images: jax.Array,
        logits: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        """The contribution of these images to the mean divergence of the whole batch.

        Args:
          arrays: Result of `arrays`.
          images: Normalised images (B, H, W, C) of the student.
          logits: The student's logits (B, h, w, K).
          count: Number of images of the whole batch.

        Returns:
          Scalar; its gradient with respect to the teacher is 0.
        """
        names = (*self._params, *self._batch_stats)
        by_name = {name: jnp.asarray(array) for name, array in zip(names, arrays, strict=True)}
        model = self._model.bind(
            {name: by_name[name] for name in self._params}, {name: by_name[name] for name in self._batch_stats}
        )
        if not (np.all(self._scale == 1) and np.all(self._shift == 0)):
            images = images * jnp.asarray(self._scale, images.dtype) + jnp.asarray(self._shift, images.dtype)
        taught, _ = model(images)
        size = logits.shape[1:3]
        taught = layers.resize(taught, size, align_corners=self._model.align_corners)
        return self.divergence.total(logits, jax.lax.stop_gradient(taught), count)


def load_teacher(
    settings: ConfigDict,
    classes: specs.DatasetSpec,
    images: specs.ImageKind,
    *,
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Teacher:
    """Loads the teacher of `config.loss`, which computes in bfloat16 on accelerators and in float32 on CPUs.

    Args:
      settings: `config.loss`.
      classes: Classes of the run.
      images: Channels and dtype of its images.
      crop: Height and width of training crops.
      mean: Mean of each channel, with which the student's images are normalised.
      std: Deviation of each channel.

    Returns:
      The teacher.

    Raises:
      CheckpointError: The checkpoint cannot be read.
      RunError: Its classes, images or sizes do not fit the run.
    """
    source = settings.distill
    console.say(f"teacher from {source}")
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    with console.log_to(console.say):
        try:
            loaded = load(source, dtype=dtype)
        except CheckpointError as error:
            own_file = f"segjax convert {source} teacher.safetensors --weights teacher"
            raise CheckpointError(str(error).replace(CHOOSE, f"name a file with one of them: {own_file}")) from None
    _refuse_other(loaded, classes, source, crop=crop, images=images)
    own_mean, own_std = np.array(loaded.mean), np.array(loaded.std)
    return Teacher(
        loaded.model,
        losses.Divergence(
            channel_wise=settings.distill_cwd, pixel_wise=settings.distill_kl, temperature=settings.distill_temperature
        ),
        scale=np.array(std) / own_std,
        shift=(np.array(mean) - own_mean) / own_std,
    )


def _refuse_other(
    loaded: LoadedCheckpoint,
    classes: specs.DatasetSpec,
    source: str,
    *,
    crop: Sequence[int],
    images: specs.ImageKind,
) -> None:
    """Raises RunError if classes, images or sizes of a teacher do not fit the run."""
    model, prefix = loaded.model, f"config.loss.distill={source}"
    if model.spec.num_classes != classes.num_classes:
        raise RunError(
            f"{prefix}: the teacher has {model.spec.num_classes} classes and the data {classes.num_classes}; a teacher "
            "must have the classes of the run"
        )
    # A checkpoint without names has only their number.
    names = classes.class_names if loaded.dataset is None else loaded.classes.class_names
    pairs = enumerate(zip(classes.class_names, names, strict=True))
    if other := [f"{number} is {ours!r} and {theirs!r}" for number, (ours, theirs) in pairs if ours != theirs]:
        more = f", and {len(other) - 5} more" * (len(other) > 5)
        raise RunError(
            f"{prefix}: classes of the data and of the teacher differ: {', '.join(other[:5])}{more}; a teacher must "
            "have the classes of the run"
        )
    takes = loaded.image_kind
    if takes.channels != images.channels or takes.dtype not in (None, images.dtype):
        raise RunError(f"{prefix}: the teacher takes images of {takes}, and the data have {images}")
    if any(side % model.size_multiple for side in crop):
        raise RunError(
            f"{prefix}: the teacher takes images whose sides are multiples of {model.size_multiple}; "
            f"config.augment.crop={tuple(crop)}"
        )
