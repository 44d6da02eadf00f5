"""`segjax.audit_dataset`: regions of masks that a model contradicts, ranked, as candidates for errors of the masks.

A region is a connected set of pixels of one class in the mask, all of which the model predicts as other classes. Its
score is the mean of -log p over its pixels, where p is the probability that the model gives to the class of the mask,
times n / (n + n0) for n pixels. The logarithm matters: a model that confuses two classes is often sure of the wrong one
and still leaves a few percent to the right one, while next to nothing is left for a class that is not there. The factor
keeps specks from the top, and n0 is a 2,000th of the image. The measurements are in benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.state_dict import logger
from segjax.data import specs
from segjax.data.open import OpenSplit, shared_splits
from segjax.data.pipeline import evaluation_batches
from segjax.data.records import Records, records_of
from segjax.inference import published_figure
from segjax.inference.engine import Computed, Inference, labels_of
from segjax.inference.evaluate_dataset import (
    inference_for,
    open_labelled,
    protocol_of_model,
    refuse_other_images,
    with_temperature,
)
from segjax.inference.exported_model import ExportedModel, metadata_of
from segjax.inference.open_exported import Loaded, opened
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import console, versions
from segjax.runtime.atomic import why_not_writable
from segjax.runtime.reading import user_path
from segjax.viz import audit as page

LISTED = 1000  # regions in the result
SHOWN = 60  # regions in the page
# Pixels of an image for a pixel of n0, see above.
PIXELS_OF_ONE = 2000
# Largest -log p that counts, in nats: float32 probabilities below 1e-7 are rounding.
LARGEST_NLL = 16.0


def audit_dataset(
    source: str | Path | Loaded | SegmentationModel,
    data: str | OpenSplit,
    *,
    reference: str | Path | Loaded | SegmentationModel | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] | None = None,
    flip: bool | None = None,
    size_divisor: int | None = None,
    base_size: tuple[int, int] | None = None,
    threshold: float | None = None,
    temperature: float | str | None = None,
    batch: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = False,
    weights: str | None = None,
) -> list[dict[str, Any]]:
    """Find regions of masks that a model contradicts, the surest first.

    The model should not be trained on the images: it would have learnt their errors.

    Args:
      source: Argument or result of `segjax.load`, or a model; or an exported file that gives scores, as for
        `segjax.open_exported`.
      data: "NAME", "NAME:SPLIT" or an open split, as for `segjax.evaluate_dataset`.
      reference: Checkpoint that an exported file was made from, as for `segjax.open_exported`.
      mean: As for `segjax.open_exported`.
      std: As for `segjax.open_exported`.
      data_source: As for `segjax.evaluate_dataset`.
      data_dir: As for `segjax.evaluate_dataset`.
      mode: As for `segjax.evaluate_dataset`, as the following settings.
      crop: As for `segjax.evaluate_dataset`.
      stride: As for `segjax.evaluate_dataset`.
      scales: As for `segjax.evaluate_dataset`.
      flip: As for `segjax.evaluate_dataset`.
      size_divisor: As for `segjax.evaluate_dataset`.
      base_size: As for `segjax.evaluate_dataset`.
      threshold: As for `segjax.evaluate_dataset`.
      temperature: As for `segjax.evaluate_dataset`; it changes the scores.
      batch: As for `segjax.evaluate_dataset`.
      output: Folder for a report (index.html, regions.json and regions.csv); by default none.
      progress: Whether to print a progress bar.
      weights: As for `segjax.load`.

    Returns:
      At most 1,000 regions, by falling score, each a dict with "image", the name; "given", the class in the mask;
      "predicted", the class predicted for most of its pixels; "box", [left, top, width, height] in pixels; "pixels",
      its area; "score", in nats, from 0 to 16; and "confidence", the mean probability of the predicted classes.

    Raises:
      CheckpointError: No model can be read from `source`.
      ValueError: Settings contradict each other, the data cannot be used, its classes or images do not fit the model,
        or `output` cannot be written.
      TooLittleMemoryError: A batch of the largest images needs more memory than a device has.

    Example:
      >>> import segjax
      >>> (split,) = segjax.data.open_splits("streets", ["test"], num_images=[2], size=(64, 96), seed=0)
      >>> model = segjax.create("segformer_b0", num_classes=split.spec.num_classes, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> regions = segjax.audit_dataset(model, split)
      >>> regions[0]["score"] >= regions[-1]["score"]
      True
    """
    began = time.perf_counter()
    settings: dict[str, Any] = dict(
        mode=mode, crop=crop, stride=stride, scales=scales, flip=flip, size_divisor=size_divisor
    )
    settings |= dict(base_size=base_size, threshold=threshold)
    # Checked before a computation that may take hours.
    output = None if output is None else user_path(output)
    if output is not None and (problem := why_not_writable(output)):
        raise ValueError(f"the report cannot be written to {output}: {problem}; choose another folder")
    row = published_figure.row_of(source, data)
    protocol = published_figure.protocol_of(row, {key: value for key, value in settings.items() if value is not None})
    batch = batch or jax.local_device_count()
    origin = None if reference is None else opened(reference)
    checkpoint = opened(source, weights=weights, mean=mean, std=std, reference=origin)
    if isinstance(checkpoint.model, ExportedModel) and checkpoint.model.output == "labels":
        raise ValueError(f"{checkpoint.model.path}: gives labels, and an audit needs scores; export it without argmax")
    config = origin.metadata.get("config") if origin else None
    images, split = open_labelled(checkpoint, data, config=config, data_source=data_source, data_dir=data_dir)
    protocol = protocol_of_model(checkpoint, protocol, settings, images)
    protocol = with_temperature(checkpoint, protocol, temperature, source)
    refuse_other_images(checkpoint, images.image_kind, images.spec.name)
    if row is not None:
        published_figure.log_notes(row, images.spec.name)
    if trained_on := _trained_on(origin or checkpoint, data, split):
        logger.info("note: the model was trained on %s, and may have learnt the errors of these masks", trained_on)
    records, model, name = records_of(images.data), checkpoint.model, f"{images.spec.name} {split}".strip()
    if not len(records):
        raise ValueError(f"there is no image in {name}")
    logger.info("model    %s, %d classes", model.spec.name, model.spec.num_classes)
    logger.info("data     %s, %d images", name, len(records))
    logger.info("scored   %s", protocol)
    logger.info("device   %d x %s", jax.local_device_count(), jax.devices()[0].device_kind)
    logger.info("compiling; the first image of each size takes longer ...")
    inference = inference_for(checkpoint, images, protocol, batch=batch)
    found = contradictions(inference, images, batch=protocol.images_at_a_time(batch))
    if progress:
        found = console.ProgressBar("auditing", len(records), "images").over(found)
    ranking = _Ranking(shown=0 if output is None else SHOWN)
    for number, truth, contradiction in found:
        regions = regions_of(truth, contradiction, images.spec.ignore_label, above=ranking.least, most=LISTED)
        ranking.add(number, contradiction.predicted, regions)
    listed = [entry.as_dict(records.names, images.spec) for entry in ranking.regions]
    if output is not None:
        checkpoint_name = str(source) if isinstance(source, str | Path) else model.spec.name
        step = checkpoint.metadata.get("step")
        facts = {
            "checkpoint": checkpoint_name if step is None else f"{checkpoint_name}, step {step}",
            "data": f"{name}, {len(records)} images",
            "protocol": str(protocol),
            "score": "mean of -log p over the region, p the probability of the class in the mask; less for small ones",
        }
        metadata = stamped(
            {
                "checkpoint": checkpoint_name,
                "step": step,
                "model": metadata_of(model),
                "data": {"name": images.spec.name, "split": split, "images": len(records)},
                "protocol": protocol.record(),
                "duration_s": round(time.perf_counter() - began, 1),
                "device": versions.of_devices(jax.local_devices()),
                "versions": versions.installed(),
            }
        )
        shown = [ranking.shown(entry, records) for entry in ranking.regions[:SHOWN]]
        title = f"Masks of {name} that {model.spec.name} contradicts"
        page.write(output, listed, images.spec, shown, title=title, facts=facts, metadata=metadata)
    return listed


def _trained_on(checkpoint: Loaded, data: str | OpenSplit, split: str) -> str:
    """The splits of the data that the run of a checkpoint was trained on; "" for none, or where it is not known."""
    config = checkpoint.metadata.get("config")
    trained = config.get("data") if isinstance(config, Mapping) else None
    if not isinstance(trained, Mapping) or not isinstance(data, str) or data.partition(":")[0] != trained.get("name"):
        return ""
    own = trained.get("train_split")
    return shared_splits(own, split) if isinstance(own, str) else ""


class Contradiction(NamedTuple):
    """What a model says of the pixels of an image and its mask.

    Attributes:
      predicted: Train ids, uint8 or uint16 (H, W).
      confidence: Probability of these classes, uint16 (H, W), 65,535 for 1.
      nll: -log p of the class in the mask, uint16 (H, W), 65,535 for `LARGEST_NLL`; 0 where the mask is ignored.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray


def contradictions(
    inference: Inference, opened: OpenSplit, *, batch: int
) -> Iterator[tuple[int, np.ndarray, Contradiction]]:
    """Number, mask (H, W) and `Contradiction` of every image."""
    settings: dict[str, Any] = dict(ignore_label=opened.spec.ignore_label, threshold=inference.protocol.threshold)
    key = inference.protocol.input_sizes
    with contextlib.closing(evaluation_batches(opened.data, batch_size=batch, key=key)) as batches:
        for images, truths, numbers in batches:
            maps = _maps(inference.begin_probabilities(images), truths, **settings)
            # The last batch of a key repeats its last image.
            yield from zip(numbers.tolist(), truths, maps, strict=False)


def _maps(
    computed: Sequence[Computed], truths: Sequence[np.ndarray], *, ignore_label: int, threshold: float
) -> list[Contradiction]:
    """Reduces the probabilities of a batch tile by tile on their device."""
    kinds, top = ([], [], []), 0
    for row in computed[0].tiles:
        reduced, left = [], 0
        for tile in row:
            height, width = tile.shape[1:3]
            truth = np.full((len(truths), height, width), ignore_label, np.int32)
            for own, mask in zip(truth, truths, strict=True):
                part = mask[top : top + height, left : left + width]
                own[: part.shape[0], : part.shape[1]] = part
            reduced.append(_reduced(tile, truth, ignore_label=ignore_label, threshold=threshold))
            left += width
        for kind, tiles in zip(kinds, zip(*reduced, strict=True), strict=True):
            kind.append(tiles)
        top += height
    return [Contradiction(*(np.asarray(Computed(kind, one.number, one.size)) for kind in kinds)) for one in computed]


@partial(jax.jit, static_argnames=("ignore_label", "threshold"))
def _reduced(
    probabilities: jax.Array, truth: jax.Array, *, ignore_label: int, threshold: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `Contradiction` (B, h, w), from probabilities (B, h, w, K) and masks int32 (B, h, w)."""
    predicted = labels_of(probabilities, threshold=threshold)
    if probabilities.shape[-1] == 1:
        probabilities = jnp.concatenate([1 - probabilities, probabilities], axis=-1)
    of_classes = [
        jnp.take_along_axis(probabilities, labels[..., None], axis=-1, mode="clip")[..., 0]
        for labels in (predicted, truth)
    ]
    confidence, given = of_classes
    nll = jnp.where(truth == ignore_label, 0, -jnp.log(jnp.maximum(given, np.exp(-LARGEST_NLL))))
    return (
        predicted.astype(specs.dtype_of_labels(probabilities.shape[-1] - 1)),
        jnp.round(confidence * 65_535).astype(np.uint16),
        jnp.round(jnp.clip(nll / LARGEST_NLL, 0, 1) * 65_535).astype(np.uint16),
    )


# ------------------------------------------------------------------------------------------------------------- regions


class Region(NamedTuple):
    """A region of one image.

    Attributes:
      given: Class in the mask.
      predicted: Class that is predicted for most of its pixels.
      box: Left, top, width and height in pixels.
      pixels: Number of pixels.
      score: As described at the top, in nats.
      confidence: Mean probability of the predicted classes.
    """

    given: int
    predicted: int
    box: tuple[int, int, int, int]
    pixels: int
    score: float
    confidence: float


def regions_of(
    truth: np.ndarray,
    contradiction: Contradiction,
    ignore_label: int,
    *,
    above: float = 0,
    most: int | None = None,
) -> dict[Region, np.ndarray]:
    """The regions of an image by falling score, and their pixels, bool of the size of the box.

    Args:
      truth: Train ids of the mask, (H, W).
      contradiction: What the model says of the image.
      ignore_label: Label of the pixels that do not count.
      above: Lowest score, exclusive.
      most: Largest number of regions; by default all.
    """
    import cv2

    differs = (truth != ignore_label) & (truth != contradiction.predicted)
    # Numbers of the regions from 1 on, and of each its class and OpenCV's box and area.
    components = np.zeros(truth.shape, np.int32)
    classes: list[np.ndarray] = []
    boxes: list[np.ndarray] = []
    total = 0
    for given in np.flatnonzero(np.bincount(truth[differs])).tolist():
        member = ((truth == given) & differs).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(member)
        there = np.s_[top : top + height, left : left + width]
        number, own, stats, _ = cv2.connectedComponentsWithStats(member[there], connectivity=4)
        np.add(own, total, out=components[there], where=own > 0)
        stats[:, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]] += [left, top]
        # Number 0 is the rest of the box.
        classes.append(np.full(number - 1, given))
        boxes.append(stats[1:])
        total += number - 1
    if not total:
        return {}
    given, stats, of_pixels = np.concatenate(classes), np.concatenate(boxes), components[differs]
    pixels = stats[:, cv2.CC_STAT_AREA]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_pixels, weights=values[differs], minlength=total + 1)[1:] / (65_535 * pixels)

    scores = mean(contradiction.nll) * LARGEST_NLL * pixels / (pixels + truth.size / PIXELS_OF_ONE)
    confidences = mean(contradiction.confidence)
    chosen = np.flatnonzero(scores > above)
    regions = {}
    for place in chosen[np.argsort(-scores[chosen], kind="stable")[:most]].tolist():
        left, top, width, height, area = stats[place].tolist()
        inside = np.s_[top : top + height, left : left + width]
        own = components[inside] == place + 1
        predicted = int(np.bincount(contradiction.predicted[inside][own]).argmax())
        box, score, confidence = (left, top, width, height), float(scores[place]), float(confidences[place])
        regions[Region(int(given[place]), predicted, box, area, score, confidence)] = own
    return regions


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """A region and the number of its image."""

    number: int
    region: Region

    @property
    def order(self) -> tuple[float, int, tuple[int, int, int, int], int]:
        return -self.region.score, self.number, self.region.box, self.region.given

    def as_dict(self, names: Sequence[str], spec: specs.DatasetSpec) -> dict[str, Any]:
        region = self.region
        return {
            "image": names[self.number],
            "given": spec.label_names[region.given],
            "predicted": spec.label_names[region.predicted],
            "box": list(region.box),
            "pixels": region.pixels,
            "score": region.score,
            "confidence": region.confidence,
        }


class _Ranking:
    """The regions with the highest scores, and predictions around the first of them.

    Attributes:
      regions: At most `LISTED`, by falling score.
    """

    def __init__(self, *, shown: int):
        self.regions: list[_Ranked] = []
        self._shown = shown
        # Predictions around the regions that are shown, and which of their pixels belong to them.
        self._around: dict[_Ranked, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def least(self) -> float:
        """The score that a region has to exceed."""
        return self.regions[-1].region.score if len(self.regions) == LISTED else 0.0

    def add(self, number: int, predicted: np.ndarray, regions: Mapping[Region, np.ndarray]) -> None:
        """Adds the regions of an image, with their pixels, and its prediction (H, W)."""
        ranked = {_Ranked(number, region): pixels for region, pixels in regions.items()}
        self.regions = sorted([*self.regions, *ranked], key=lambda entry: entry.order)[:LISTED]
        shown = self.regions[: self._shown]
        for entry in shown:
            if entry in ranked:
                left, top, width, height = entry.region.box
                whole = np.zeros(predicted.shape, bool)
                whole[top : top + height, left : left + width] = ranked[entry]
                there = page.part_around(entry.region.box, predicted.shape)
                self._around[entry] = predicted[there].copy(), whole[there].copy()
        self._around = {entry: self._around[entry] for entry in shown}

    def shown(self, entry: _Ranked, records: Records) -> page.Shown:
        """The pictures of one of the first regions."""
        image, truth = records[entry.number]
        there = page.part_around(entry.region.box, truth.shape)
        return page.Shown(image[there], truth[there], *self._around[entry])
