"""Reading, computing and writing at the same time, in order."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from segjax.runtime import atomic

FAULTS = (ValueError, OSError, RuntimeError, MemoryError)  # of one input; jax's own are RuntimeErrors
THREADS = 2  # that read images, and as many that write; each may be one image ahead or behind


# ------------------------------------------------------------------------------------------------------------- pipeline


def overlapped(
    items: Iterable,
    *,
    read: Callable,
    key: Callable[[object], Hashable],
    compute: Callable[[list], list],
    write: Callable[[object, object, object], None],
    failed: Callable[[object, Exception], None],
    done: Callable[[object], None],
    batch: int,
    threads: int,
) -> None:
    """Reads ahead, computes, and writes behind, all at the same time; each in the order of the items.

    With one thread a read or write begins after the one before it. No more than two batches and twice the threads are
    held at a time.

    Args:
      read: item -> what is computed with; None ends it all, as the end of the items does.
      key: neighbours that are equal in this go together, up to `batch` of them.
      compute: what was read of several items -> a result for each.
      write: called with an item, what was read of it, and its result.
      failed, done: told of each item, here; `failed` may raise the error again, which stops everything.
    """
    writing: deque[tuple[object, Future]] = deque()

    def settle(most: int) -> None:
        while len(writing) > most:
            item, future = writing.popleft()
            with _told(failed, [item]):
                future.result()
                done(item)

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        try:
            for group in _neighbours(_read_ahead(items, read, failed, readers, threads), key, batch):
                results = None
                with _told(failed, [item for item, _ in group]):
                    results = compute([content for _, content in group])
                for (item, content), result in zip(group, results or (), strict=False):
                    settle(max(threads, batch) - 1)
                    writing.append((item, writers.submit(write, item, content, result)))
            settle(0)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _told(failed: Callable, items: Sequence) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise
        for item in items:
            failed(item, error)


def _read_ahead(items, read, failed, readers, ahead: int) -> Iterator[tuple[object, object]]:
    items, pending = iter(items), deque()
    while True:
        pending += [(item, readers.submit(read, item)) for item in itertools.islice(items, ahead + 1 - len(pending))]
        if not pending:
            return
        item, future = pending.popleft()
        content = _FAILED
        with _told(failed, [item]):
            content = future.result()
        if content is None:
            return
        if content is not _FAILED:
            yield item, content


_FAILED = object()


def _neighbours(pairs: Iterable[tuple], key: Callable, most: int) -> Iterator[list[tuple]]:
    """Runs of pairs whose contents are equal in their key, at most so long."""
    group = []
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
