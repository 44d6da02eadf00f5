"""Reading, computing and writing at the same time, in order."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from segjax.runtime import atomic

FAULTS = (ValueError, OSError, RuntimeError, MemoryError)  # errors of one input; jax's own are RuntimeErrors
Item = TypeVar("Item")
Content = TypeVar("Content")
Result = TypeVar("Result")
THREADS = 2  # to read images, and as many to write; each thread may be one image ahead or behind


# ------------------------------------------------------------------------------------------------------------- pipeline


def overlapped(
    items: Iterable[Item],
    *,
    read: Callable[[Item], Content | None],
    key: Callable[[Content], Hashable],
    compute: Callable[[list[Content]], list[Result]],
    write: Callable[[Item, Content, Result], None],
    failed: Callable[[Item, Exception], None],
    done: Callable[[Item], None],
    batch: int,
    threads: int,
) -> None:
    """Reads ahead, computes, and writes behind, all at the same time and each in the order of the items.

    With one thread, reads do not overlap each other, and neither do writes. At most two batches, and two items per
    thread, are in memory at a time.

    Args:
      items: Items to process.
      read: Function from an item to its content; a content of None ends the pipeline.
      key: Function from a content to its key; consecutive items with equal keys are computed together.
      compute: Function from the contents of several items to their results.
      write: Function of an item, its content and its result.
      failed: Function of an item and its error, called in the caller's thread; it may raise the error, which stops the
        pipeline.
      done: Function of a completed item, called in the caller's thread.
      batch: Maximum number of items that are computed together.
      threads: Number of threads to read, and of threads to write.
    """
    writing: deque[tuple[Item, Future[None]]] = deque()

    def settle(most: int) -> None:
        while len(writing) > most:
            item, future = writing.popleft()
            with _reported(failed, [item]):
                future.result()
                done(item)

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        try:
            for group in _neighbours(_read_ahead(items, read, failed, readers, threads), key, batch):
                results: list[Result] = []
                with _reported(failed, [item for item, _ in group]):
                    results = compute([content for _, content in group])
                for (item, content), result in zip(group, results, strict=False):
                    settle(max(threads, batch) - 1)
                    writing.append((item, writers.submit(write, item, content, result)))
            settle(0)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _reported(failed: Callable[[Item, Exception], None], items: Sequence[Item]) -> Iterator[None]:
    """Calls `failed` for each item instead of raising an error, except that of a full disk."""
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise
        for item in items:
            failed(item, error)


def _read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Content | None],
    failed: Callable[[Item, Exception], None],
    readers: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[Item, Content]]:
    items = iter(items)
    pending: deque[tuple[Item, Future[Content | None]]] = deque()
    while True:
        pending += [(item, readers.submit(read, item)) for item in itertools.islice(items, ahead + 1 - len(pending))]
        if not pending:
            return
        item, future = pending.popleft()
        contents: list[Content | None] = []
        with _reported(failed, [item]):
            contents = [future.result()]
        # Empty if the read failed.
        for content in contents:
            if content is None:
                return
            yield item, content


def _neighbours(
    pairs: Iterable[tuple[Item, Content]], key: Callable[[Content], Hashable], most: int
) -> Iterator[list[tuple[Item, Content]]]:
    """Runs of at most `most` consecutive pairs whose contents have the same key."""
    group: list[tuple[Item, Content]] = []
    for item, content in pairs:
        if group and key(group[0][1]) != key(content):
            yield group
            group = []
        group.append((item, content))
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group
