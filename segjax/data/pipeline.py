"""Batches: for training from device memory or streamed from disk, for evaluation in groups of one image size.

A split is given as a `Split`, which is in memory, or as `Records`, which are decoded when they are read.
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
    """Numbers of the images that step `step` (from 0) trains on: int64 (B,).

    The samples are an endless sequence of permutations, a new one each epoch, so that every image is used once per
    epoch even if the batch size does not divide the number of images.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_images)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_images) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


class TrainBatches:
    """Training batches as a pure function of (seed, step), so that a resumed run needs only its step.

    Every device holds the whole split as integers. Nothing waits here; `waited` and `close` exist because
    `StreamBatches` has them.

    Attributes:
      resident_bytes: Of the split, on each device.
    """

    waited = 0.0

    def __init__(self, split: specs.Split, *, batch_size: int, seed: int, parallel: Parallel):
        parallel.check(batch_size)
        self.indices = partial(order, num_images=len(split.images), batch_size=batch_size, seed=seed)

        def everywhere(array):
            # Not device_put, which sends the array between all processes to check that it is the same in each.
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
    """Reads the part of a step's batch that belongs to this process, into host memory.

    Attributes:
      order: Step -> numbers of the images (B,).
      rows: Int32 (b,), positions in the batch that this process reads.
      draw: Step, sizes (b, 2) -> crops of these rows.
      place: Changes the crop of a sample by its label; None where no setting does.
      window: Height and width of the windows.
      seed: Of the random numbers of `settings.on_host`.
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
        """An image and its label, changed by the function of `on_host`."""
        image, label = self.records[number]
        if not self.settings.on_host:
            return image, label
        # The spawn key, because zeros at the end of a seed do not count: [seed, epoch] is that of an epoch's order.
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, step, int(position)), spawn_key=(0,)))
        try:
            return hooks.on_host(self.settings.on_host, rng, image, label)
        except BaseException as error:
            # BaseException, because a thread that ends without a result leaves the training waiting for it.
            reason = str(error) or type(error).__name__
            raise RecordError(f"{self.records.names[number]} cannot be augmented: {reason}") from error

    def _cut(self, whole: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """The window of an array (H, W, ...), filled up with zeros."""
        top, left = origin
        height, width = self.window
        part = whole[top : top + height, left : left + width]
        window = np.zeros((height, width, *whole.shape[2:]), whole.dtype)
        window[: part.shape[0], : part.shape[1]] = part
        return window


def _sample_draws(
    key: jax.Array, rows: np.ndarray, settings: AugmentSettings
) -> Callable[[np.int32, np.ndarray], Crops]:
    """`(step, sizes (b, 2)) -> Crops`, the same as in the training step, computed on the host."""

    def draw(key, step, sizes):
        sample_keys, _ = step_keys(key, step, rows)
        return draw_crops(sample_keys, sizes, settings)

    return compiled_on_host(draw, key, np.int32(0), np.zeros((len(rows), 2), np.int32))


class StreamBatches:
    """Batches of records that need not fit into memory; after `augment`, bit for bit those of `TrainBatches`.

    The crop of a sample depends only on the key of the run. It is drawn in advance, and only the window of the image
    that it needs is sent to the device. Threads decode and cut windows; one more thread sends batches to the devices,
    where at most two wait. Each of several processes reads what its own devices train on.

    Attributes:
      waited: Seconds that `at` has waited for images.
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
          settings, ignore_label, class_pixels: As in `augment`.
          key: Random key of the run, the same that the training step gets.
          start: The first step that `at` will be called with.
          threads: Number of threads that decode; `threads + 1` batches wait in host memory.
          cache_bytes: Bytes of decoded images that are kept in memory.

        Raises:
          ValueError: A batch that does not divide among the devices, or no `class_pixels` for `class_balance`.
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
        # An object of its own: threads that refer to `self`, and `self` to them, would keep each other alive.
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
        """The batches from step `step` on, which threads begin to compute."""
        import grain

        self.close()
        endless = range(step, step + 2**62)
        placed = ahead(endless, self._load, threads=self._threads).map(self._spread)
        self._batches = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=1))
        self._batches.start_prefetch()
        self._next = step
        return self._batches

    def at(self, step: int) -> dict[str, Any]:
        """The batch of step `step`, on the devices. A step that does not follow the previous one restarts the threads.

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
        """Stops the threads after the batches that they are working on."""
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
    """Every image once, at its own size, read in advance by threads.

    Args:
      key: Of a height and width in pixels. A batch has images whose sizes have equal keys; None for images of one size.
      part: (i, n) yields the i-th of n parts, which have almost equal numbers of batches.
      done: Numbers of images to omit.

    Yields:
      B images (H, W, C), their labels (H, W), and int64 (n,) image numbers. The last batch of a key repeats
      its last image up to B images, and only the first n images count.

    Raises:
      RecordError: An image or a label cannot be used.
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
