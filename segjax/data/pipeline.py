"""Batches: for training from arrays that live on the device, for evaluation image by image in groups of one size."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data import specs
from segjax.step import Parallel


class TrainBatches:
    """Training batches as a pure function of (seed, step): a resumed run needs to know nothing but its step.

    The split lies on every device as uint8. The samples are one endless row of permutations, a new one each epoch, so
    that every image comes up once per epoch also where the batch does not divide their number.
    """

    def __init__(self, split: specs.Split, *, batch_size: int, seed: int, parallel: Parallel):
        parallel.check(batch_size)
        self.batch_size = batch_size
        self.seed = seed
        self.num_images = len(split.images)
        resident = jax.device_put((split.images, split.labels, split.sizes), parallel.whole)

        def gather(resident, indices):
            images, labels, sizes = (jnp.take(array, indices, axis=0) for array in resident)
            position = jnp.arange(batch_size, dtype=jnp.int32)
            return {"image": images, "label": labels, "size": sizes, "position": position}

        self._gather, self._resident = parallel.batch(gather), resident

    def indices(self, step: int) -> np.ndarray:
        """Which images step `step` (from 0) trains on: int64 (B,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_images)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_images) for epoch in np.unique(epochs)
        }
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def at(self, step: int) -> dict[str, jax.Array]:
        """The batch of step `step`, on the devices: image, label, size and position in the batch."""
        return self._gather(self._resident, self.indices(step))


def evaluation_batches(split: specs.Split, *, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every image once, at its own size, without the padding it is stored with.

    Yields:
      uint8 (B, H, W, 3), uint8 (B, H, W) and int64 (n,) image numbers. Images of one size share batches; the last batch
      of a size repeats its last image up to B rows, and n < B says how many rows count.
    """
    for size in np.unique(split.sizes, axis=0):
        height, width = size
        numbers = np.flatnonzero((split.sizes == size).all(axis=1))
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            rows = np.pad(chosen, (0, batch_size - len(chosen)), mode="edge")
            yield split.images[rows, :height, :width], split.labels[rows, :height, :width], chosen
