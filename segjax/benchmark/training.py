"""A training step as `segjax train` compiles it, without augmentation: AdamW, one learning rate for all parameters."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from segjax import losses
from segjax.models.segmentation_model import SegmentationModel
from segjax.recipes import common
from segjax.train import optim, setup
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

LR, WEIGHT_DECAY = 6e-5, 0.01
# By dotted name.
Arrays = dict[str, jax.Array]


def training_step(
    model: SegmentationModel,
    *,
    num_classes: int,
    scan_blocks: bool = False,
    remat: bool = False,
    axis_name: str | None = None,
) -> tuple[TrainStep, Callable[[Arrays, Arrays], TrainState]]:
    """The uncompiled step of a model, for labels in which 255 is ignored.

    Args:
      model: Model; its arrays may be abstract, with only shapes and dtypes.
      scan_blocks, remat: As the settings of `config.train`.
      axis_name: `Parallel.axis_name`.

    Returns:
      The step; and a traceable function from parameters and running statistics to the initial state, which shares
      their arrays.
    """
    config = common.get_config("folder")
    config.optim.update(lr=LR, weight_decay=WEIGHT_DECAY, no_decay="", warmup_steps=0, lr_multipliers=())
    config.train.update(scan_blocks=scan_blocks, remat=remat)
    functional = setup.make_functional(model, config.optim, config.train, axis_name=axis_name)
    params, _ = functional.arrays()
    optimizer = optim.optimizer(config.optim, params, steps=10**9, stacks=functional.stacks)
    step = TrainStep(
        model=functional,
        optimizer=optimizer,
        augment=lambda _, batch: (batch["image"], batch["label"]),
        criterion=losses.criterion(config.loss, num_classes=num_classes, ignore_label=255),
        aux_weight=config.loss.aux_weight,
    )

    def start(params: Arrays, batch_stats: Arrays) -> TrainState:
        return functional.stacks.stacked(TrainState.start(params, batch_stats, optimizer.init(params)))

    return step, start


def example(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of a step: normalised images (B, H, W, C), float32, and labels (B, H, W), uint8."""
    return {"image": images, "label": labels, "position": np.arange(len(images), dtype=np.int32)}
