"""CutMix and ClassMix on the device: parts of the next sample of a batch replace parts of a sample.

An image and its label change at the same pixels, so every pixel keeps its own label, the ignore label included.
Samples are mixed after augmentation. The order of a batch is random, so the next sample is a random partner; it does
not depend on the number of devices, and a device needs only one sample of its neighbour.

Sources: CutMix, Yun et al., 2019, with boxes inside the image as in French et al., "Semi-supervised semantic
segmentation needs strong, varied perturbations", 2020. ClassMix, Olsson et al., 2021.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from segjax.data.crops import AugmentSettings

# Keys of a sample are folded from small numbers: see `crops` and `augment`, which use those from 0 to 5.
_MIX = 6


def is_mixed(settings: AugmentSettings) -> bool:
    """Whether the settings mix samples."""
    return settings.cutmix > 0 or settings.classmix > 0


def mix(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    settings: AugmentSettings,
    *,
    num_classes: int,
    ignore_label: int,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each sample, with the probabilities of the settings, with the sample after it; the last with the first.

    Args:
      keys: (B,) random keys of the samples, from `augment.step_keys`.
      images: Augmented images (B, h, w, C).
      labels: Augmented labels (B, h, w).
      settings: The `augment` section of a config: `cutmix` and `classmix` are probabilities with a sum of at most 1.
      num_classes: Number of classes K.
      ignore_label: Label of the pixels that do not count.
      axis_name: Name of the mapped axis under pmap, whose devices hold consecutive parts of the batch.

    Returns:
      Images and labels of the same shapes and dtypes.
    """
    drawn = jax.vmap(partial(_is_taken, settings=settings, num_values=max(num_classes, 2), ignore_label=ignore_label))
    others = _next(labels, axis_name)
    is_taken = drawn(keys, others)
    mixed = jnp.where(is_taken[..., None], _next(images, axis_name), images)
    return mixed, jnp.where(is_taken, others, labels)


def _next(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sample after each sample of the whole batch, (B, ...)."""
    first = x[:1]
    if axis_name is not None:
        devices = lax.axis_size(axis_name)
        first = lax.ppermute(first, axis_name, [(device, (device - 1) % devices) for device in range(devices)])
    return jnp.concatenate([x[1:], first])


def _is_taken(
    key: jax.Array, other: jax.Array, *, settings: AugmentSettings, num_values: int, ignore_label: int
) -> jax.Array:
    """The pixels that a sample takes from its partner, with labels `other` (h, w): bool (h, w)."""
    choice_key, box_key, classes_key = jax.random.split(jax.random.fold_in(key, _MIX), 3)
    choice = jax.random.uniform(choice_key)
    is_taken = jnp.zeros(other.shape, bool)
    if settings.classmix:
        is_classmix = choice < settings.cutmix + settings.classmix
        is_taken = is_classmix & of_half_the_classes(
            classes_key, other, num_values=num_values, ignore_label=ignore_label
        )
    if settings.cutmix:
        is_taken = jnp.where(choice < settings.cutmix, box(box_key, other.shape), is_taken)
    return is_taken


def box(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """A box of the image's aspect ratio at a random place, bool `size`; its share of the area is uniform in 0..1."""
    share_key, *place_keys = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(share_key))
    inside = []
    for length, place_key in zip(size, place_keys, strict=True):
        extent = jnp.round(length * side).astype(jnp.int32)
        first = jax.random.randint(place_key, (), 0, length - extent + 1)
        pixels = jnp.arange(length)
        inside.append((pixels >= first) & (pixels < first + extent))
    rows, columns = inside
    return rows[:, None] & columns


def of_half_the_classes(key: jax.Array, label: jax.Array, *, num_values: int, ignore_label: int) -> jax.Array:
    """The pixels of half of the classes of a label (h, w), rounded down and drawn at random: bool (h, w)."""
    values = jnp.arange(num_values)
    is_counted = label != ignore_label
    is_present = jnp.any((label[..., None] == values) & is_counted[..., None], axis=(0, 1))
    # Absent classes come last in the random order.
    order = jnp.where(is_present, jax.random.uniform(key, (num_values,)), 2)
    place = jnp.argsort(jnp.argsort(order))
    is_chosen = is_present & (place < jnp.sum(is_present) // 2)
    return jnp.take(is_chosen, label.astype(jnp.int32), mode="clip") & is_counted
