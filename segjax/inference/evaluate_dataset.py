"""`segjax.evaluate_dataset`: mIoU and other figures of any checkpoint on a split of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from segjax.checkpoints.load import LoadedCheckpoint, as_loaded
from segjax.checkpoints.state_dict import logger
from segjax.data import specs
from segjax.data.open import OpenSplit, open_splits
from segjax.data.sources import DataError, listed
from segjax.inference.engine import Inference, Protocol
from segjax.inference.evaluation import evaluate
from segjax.viz.report import summarise


def evaluate_dataset(
    source: str | Path | LoadedCheckpoint | nnx.Module,
    data: str | OpenSplit,
    *,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    mode: str = "whole",
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size_divisor: int = 1,
    batch: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a split: one confusion matrix over all images, logits resized to each label's size.

    Args:
      source: as for `segjax.load`, the result of it, or a model.
      data: "NAME" or "NAME:SPLIT", with NAME a key of `segjax.data.DATASETS`, whose published evaluation split is the
        default; or one of `segjax.data.open_splits`.
      data_source, data_dir: the files that NAME is prepared from at its first use, and the folder for the prepared
        data set; as `source` and `data_dir` of `segjax.data.open_splits`.
      mode, crop, stride, scales, flip: as for `segjax.Predictor`.
      size_divisor: each scaled image is resized up to multiples of this (mmsegmentation's AlignedResize).
      batch: images, or with mode "slide" crops, that go through the model at a time; one for each device by default.

    Returns:
      "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_precision", "mean_recall" and "mean_dice" in 0..1, or None
      where no pixel counts; "per_class_iou", K numbers, or None for a class that occurs nowhere; and "classes", with a
      dict for each class: "class", "iou", "accuracy", "precision", "recall", "dice" and "pixels".

    Raises:
      CheckpointError: no model can be read from `source`.
      ValueError: settings that contradict each other, data that cannot be used, or classes other than the model's.
    """
    protocol = Protocol.of(mode, crop=crop, stride=stride, scales=scales, flip=flip, size_divisor=size_divisor)
    checkpoint = as_loaded(source)
    if isinstance(data, str):
        name, _, split = data.partition(":")
        data = open_evaluated(name, split, checkpoint, data_source=data_source, data_dir=data_dir)
    elif data_source is not None or data_dir is not None:
        raise ValueError("data_source and data_dir are for data that is given by its name; omit them")
    refuse_other_classes(checkpoint, data.spec)
    batch = batch or jax.local_device_count()
    inference = Inference(checkpoint.model, protocol, batch=batch, normalise=checkpoint.normalise)
    # The crops of one image make a batch, or several whole images do.
    batch_size = batch if mode == "whole" else 1
    confusion, _ = evaluate(inference.labels, data.data, data.spec, batch_size=batch_size)
    return summarise(confusion, data.spec)


def open_evaluated(
    name: str,
    split: str,
    checkpoint: LoadedCheckpoint,
    *,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> OpenSplit:
    """Opens a split with labels, by default the one that is evaluated as published. If `checkpoint` comes from a run on
    the same generated data set, the images are those of that run.

    Raises:
      ValueError: there is no such data set or split, or it cannot be used.
    """
    if name not in specs.DATASETS:
        raise DataError(f"no dataset {name!r}; there are {', '.join(specs.DATASETS)}")
    dataset, config = specs.DATASETS[name], checkpoint.metadata.get("config")
    split, generated = split or dataset.evaluated_split, dict[str, Any]()
    if config and config["data"]["name"] == name and dataset.kind == "generated":
        run = config["data"]
        only_trained_on = split == run["train_split"] != run["eval_split"]
        number = run["train_images"] if only_trained_on else run["eval_images"]
        generated |= dict(num_images=[number], size=tuple(run["size"]), seed=config["seed"])
    (opened,) = open_splits(name, [split], source=data_source, data_dir=data_dir, say=logger.info, **generated)
    return opened


def refuse_other_classes(checkpoint: LoadedCheckpoint, classes: specs.DatasetSpec) -> None:
    """Raises ValueError where the classes of a checkpoint are not those of a data set, in the same order.

    Up to a quarter of the names may differ, because packages spell some of them differently; these are logged.
    """
    dataset, own = checkpoint.dataset, checkpoint.model.spec.num_classes
    of = f" of {dataset['name']}" if dataset else ""
    if own != classes.num_classes:
        raise ValueError(
            f"the model has {own} classes{of}, and {classes.name} has {classes.num_classes}: no figure would mean "
            "anything; choose the data set that it was trained on"
        )
    if not dataset:
        logger.info("the checkpoint does not name its classes; those of %s are assumed, in their order", classes.name)
        return
    differing = [
        f"{number} is {name!r}, not {other!r}"
        for number, (name, other) in enumerate(zip(dataset["class_names"], classes.class_names, strict=True))
        if name.strip().casefold() != other.casefold()
    ]
    if len(differing) > own / 4:
        raise ValueError(
            f"the classes of the model{of} are not those of {classes.name}: {listed(differing)}; choose the data set "
            "that it was trained on, or one with the same classes in the same order"
        )
    if differing:
        logger.info("classes with other names in the checkpoint: %s", listed(differing))
