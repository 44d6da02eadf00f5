"""Batches: for training, from device memory or streamed from disk; for evaluation, in groups of one image size.

A split is a `Split` in memory, or `Records` that are decoded when they are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Generator, Hashable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data import hooks, specs
from segjax.data.augment import needs_labels, rarity_for, step_keys
from segjax.data.crops import (
    AugmentSettings,
    Crops,
    HostPlacement,
    compiled_on_host,
    draw_crops,
    window_size,
    with_origins,
)
from segjax.data.records import THREADS, CachedRecords, RecordError, Records, ahead, read, records_of
from segjax.runtime.parallel import Parallel

# ----------------------------------------------------------------------------------------------------------- training


def order(step: int, *, num_images: int, batch_size: int, seed: int) -> np.ndarray:
    """Numbers of the images in the batch of step `step` (from 0), int64 (B,).

    The samples are an endless sequence of permutations, a new one per epoch. Every image is therefore used once per
    epoch, even if the batch size does not divide the number of images.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_images)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_images) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


class TrainBatches:
    """Training batches as a pure function of (seed, step), so that a resumed run needs only its step.

    Every device holds the whole split in the dtype of its images. `waited` and `close` exist for the interface of
    `StreamBatches`.

    Attributes:
      resident_bytes: Bytes of the split, on each device.

    Example:
      >>> import jax
      >>> from segjax import data
      >>> from segjax.runtime.parallel import parallel_for
      >>> (opened,) = data.open_splits("streets", ["train"], num_images=[3], size=(40, 64))
      >>> with data.TrainBatches(
      ...     opened.data, batch_size=2, seed=0, parallel=parallel_for("jit", jax.devices()[:1])
      ... ) as batches:
      ...     batches.at(0)["image"].shape
      (2, 40, 64, 3)
    """

    waited = 0.0

    def __init__(self, split: specs.Split, *, batch_size: int, seed: int, parallel: Parallel):
        parallel.check(batch_size)
        self.indices = partial(order, num_images=len(split.images), batch_size=batch_size, seed=seed)

        def everywhere(array):
            # Not device_put, which sends the array between all processes to check that it is equal in each.
            return jax.make_array_from_callback(array.shape, parallel.whole, lambda index: array[index])

        def gather(resident, rows):
            indices, position = rows
            images, labels, sizes = (jnp.take(array, indices, axis=0) for array in resident)
            return {"image": images, "label": labels, "size": sizes, "position": position}

        self._positions = np.arange(batch_size, dtype=np.int32)
        self._gather, self._resident = parallel.batch(gather), jax.tree.map(everywhere, tuple(split[:3]))
        self.resident_bytes = sum(array.nbytes for array in self._resident)

    def at(self, step: int) -> dict[str, jax.Array]:
        """The batch of step `step`, on the devices: image, label, size and position in the batch."""
        return self._gather(self._resident, (self.indices(step), self._positions))

    def close(self) -> None:
        pass

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *_) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _WindowLoader:
    """Reads this process's part of the batch of a step into host memory.

    Attributes:
      records: Records of the split.
      order: Step -> numbers of the images (B,).
      rows: Positions in the batch that this process reads, int32 (b,).
      draw: (step, sizes (b, 2)) -> crops of these rows.
      place: Function that places the crop of a sample by its label; None if no setting needs labels.
      window: Height and width of the windows.
      settings: The `augment` section of a config.
      seed: Seed of the random numbers for `settings.on_host`.
    """

    records: CachedRecords
    order: Callable[[int], np.ndarray]
    rows: np.ndarray
    draw: Callable[[np.int32, np.ndarray], Crops]
    place: HostPlacement | None
    window: tuple[int, int]
    settings: AugmentSettings
    seed: int

    def __call__(self, step: int) -> dict[str, Any]:
        numbers = self.order(step)[self.rows]
        sizes = self.records.sizes[numbers]
        drawn = jax.tree.map(np.asarray, self.draw(np.int32(step), sizes))
        crops, images, labels = [], [], []
        for row, (number, position) in enumerate(zip(numbers, self.rows, strict=True)):
            image, label = self._read(number, step, position)
            crop: Crops = jax.tree.map(lambda array, row=row: array[row], drawn)
            if self.place is not None:
                crop = self.place(step, position, crop, label)
            crop = with_origins(crop, sizes[row], self.window, self.settings)
            crops.append(crop)
            for windows, whole in ((images, image), (labels, label)):
                windows.append(self._cut(whole, np.asarray(crop.origin)))
        crop = Crops(*map(np.stack, zip(*crops, strict=True)))
        samples = {"image": np.stack(images), "label": np.stack(labels), "size": sizes}
        return {**samples, "position": self.rows, "crop": crop}

    def _read(self, number: int, step: int, position: np.int32) -> tuple[np.ndarray, np.ndarray]:
        """An image and its label, after the function of `on_host`."""
        image, label = self.records[number]
        if not self.settings.on_host:
            return image, label
        # With a spawn key, because SeedSequence ignores zeros at the end, and [seed, epoch] is the seed of an epoch's
        # order.
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, step, int(position)), spawn_key=(0,)))
        try:
            return hooks.on_host(self.settings.on_host, rng, image, label)
        except BaseException as error:
            # BaseException, because the training would wait forever for a thread that ends without a result.
            reason = str(error) or type(error).__name__
            raise RecordError(f"{self.records.names[number]} cannot be augmented: {reason}") from error

    def _cut(self, whole: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """The window of an array (H, W, ...), padded with zeros."""
        top, left = origin
        height, width = self.window
        part = whole[top : top + height, left : left + width]
        window = np.zeros((height, width, *whole.shape[2:]), whole.dtype)
        window[: part.shape[0], : part.shape[1]] = part
        return window


def _sample_draws(
    key: jax.Array, rows: np.ndarray, settings: AugmentSettings
) -> Callable[[np.int32, np.ndarray], Crops]:
    """A function (step, sizes (b, 2)) -> `Crops`, which draws on the host the same crops as the training step."""

    def draw(key, step, sizes):
        sample_keys, _ = step_keys(key, step, rows)
        return draw_crops(sample_keys, sizes, settings)

    return compiled_on_host(draw, key, np.int32(0), np.zeros((len(rows), 2), np.int32))


class StreamBatches:
    """Batches of records that need not fit into memory; after `augment`, they equal those of `TrainBatches` bit for
    bit.

    Crops are drawn in advance, and only the window of the image that a crop needs is sent to the device. Threads decode
    images and cut windows; another thread sends batches to the devices, where at most two wait. With several processes,
    each reads only the samples of its own devices.

    Attributes:
      waited: Seconds that `at` has waited for images, in total.

    Example:
      >>> import jax
      >>> from segjax import data
      >>> from segjax.runtime.parallel import parallel_for
      >>> from segjax.train.schema import default_config
      >>> (opened,) = data.open_splits("streets", ["train"], num_images=[3], size=(40, 64))
      >>> settings, parallel = default_config("streets").augment, parallel_for("jit", jax.devices()[:1])
      >>> settings.crop = (32, 32)
      >>> with data.StreamBatches(
      ...     data.records_of(opened.data),
      ...     batch_size=2,
      ...     seed=0,
      ...     parallel=parallel,
      ...     settings=settings,
      ...     ignore_label=opened.spec.ignore_label,
      ...     key=jax.random.key(0),
      ... ) as batches:
      ...     len(batches.at(0)["label"])
      2
    """

    resident_bytes = 0

    def __init__(
        self,
        records: Records,
        *,
        batch_size: int,
        seed: int,
        parallel: Parallel,
        settings: AugmentSettings,
        ignore_label: int,
        class_pixels: np.ndarray | None = None,
        key: jax.Array,
        start: int = 0,
        threads: int = THREADS,
        cache_bytes: float = 0,
    ):
        """Starts the threads.

        Args:
          records: Records of the split.
          batch_size: Number of samples of a batch, over all processes.
          seed: Seed of the order of the images, and of `settings.on_host`.
          parallel: Devices of the run.
          settings, ignore_label, class_pixels: As in `augment`.
          key: Random key of the run, the same as for the training step.
          start: First step for which `at` will be called.
          threads: Number of threads that decode; `threads + 1` batches wait in host memory.
          cache_bytes: Maximum bytes of decoded images that are kept in memory.

        Raises:
          ValueError: The batch does not divide among the devices, or `class_balance` lacks `class_pixels`.
        """
        parallel.check(batch_size)
        rows = parallel.rows(batch_size).astype(np.int32)
        self.waited = 0.0
        self.indices = partial(order, num_images=len(records), batch_size=batch_size, seed=seed)
        place = None
        if needs_labels(settings):
            place = HostPlacement(
                key,
                lambda key, step, position: step_keys(key, step, position[None])[0][0],
                settings,
                ignore_label=ignore_label,
                rarity=rarity_for(settings, class_pixels),
            )
        # A separate object: threads that refer to `self` would keep it alive, and it would keep the threads alive.
        self._load = _WindowLoader(
            CachedRecords(records, cache_bytes),
            self.indices,
            rows,
            _sample_draws(key, rows, settings),
            place,
            window_size(records.sizes, settings),
            settings,
            seed,
        )
        self._threads, self._spread = threads, parallel.spread
        self._batches = None
        self._go_to(start)

    def _go_to(self, step: int) -> Iterator:
        """Starts threads that compute the batches from step `step` on, and returns the batches."""
        import grain

        self.close()
        endless = range(step, step + 2**62)
        placed = ahead(endless, self._load, threads=self._threads).map(self._spread)
        self._batches = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=1))
        self._batches.start_prefetch()
        self._next = step
        return self._batches

    def at(self, step: int) -> dict[str, Any]:
        """The batch of step `step`, on the devices. Any other step than the next one restarts the threads.

        Raises:
          RecordError: An image or a label cannot be used.
        """
        since = time.perf_counter()
        batches = self._batches
        if batches is None or step != self._next:
            batches = self._go_to(step)
        try:
            batch = next(batches)
        except BaseException:
            self.close()
            raise
        self._next = step + 1
        self.waited += time.perf_counter() - since
        return batch

    def close(self) -> None:
        """Stops the threads after their current batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> StreamBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluation_groups(
    records: Records,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    part: tuple[int, int] = (0, 1),
    done: Collection[int] = (),
) -> list[np.ndarray]:
    """Numbers of the images of each batch of `evaluation_batches`."""
    sizes, which = np.unique(records.sizes, axis=0, return_inverse=True)
    omitted = np.fromiter(done, np.int64)
    by_key: dict[Hashable, list[np.ndarray]] = {}
    for row, (height, width) in enumerate(sizes.tolist()):
        numbers = np.setdiff1d(np.flatnonzero(which.ravel() == row), omitted)
        by_key.setdefault(key((height, width)) if key else row, []).append(numbers)
    groups = []
    for of_sizes in by_key.values():
        numbers = np.concatenate(of_sizes)
        groups += [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    return groups[part[0] :: part[1]]


def evaluation_batches(
    data: specs.Split | Records,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    part: tuple[int, int] = (0, 1),
    done: Collection[int] = (),
) -> Generator[tuple[list[np.ndarray], list[np.ndarray], np.ndarray], None, None]:
    """Yields every image once, at its own size; threads read ahead.

    Args:
      data: The split.
      batch_size: Number of images per batch, B.
      key: (height, width) -> key. The images of a batch have equal keys; by default equal sizes.
      part: (i, n) selects the i-th of n parts, which have almost equal numbers of batches.
      done: Numbers of images to omit.

    Yields:
      B images (H, W, C), their labels (H, W), and the numbers of the first n images, int64 (n,). The last batch of a
      key repeats its last image up to B images; only the first n images count.

    Raises:
      RecordError: An image or a label cannot be used.

    Example:
      >>> from segjax import data
      >>> (opened,) = data.open_splits("streets", ["val"], num_images=[3], size=(40, 64))
      >>> [numbers.tolist() for images, labels, numbers in data.evaluation_batches(opened.data, batch_size=2)]
      [[0, 1], [2]]
    """
    records = records_of(data)
    groups = evaluation_groups(records, batch_size=batch_size, key=key, part=part, done=done)
    if not groups:
        return

    def work(numbers):
        pairs = [read(records, number) for number in numbers]
        pairs += pairs[-1:] * (batch_size - len(pairs))
        images, labels = (list(arrays) for arrays in zip(*pairs, strict=True))
        return images, labels, numbers

    with contextlib.closing(iter(ahead(groups, work, threads=THREADS))) as batches:
        yield from batches
