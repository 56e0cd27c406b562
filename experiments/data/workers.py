"""The items of a sequence, made ahead of time by worker processes."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

# The sequence of a worker process.
_items: Any = None


def made_ahead(items: Any, workers: int) -> Iterator[Any]:
    """`items[0]`, `items[1]` and so on, in order, up to two for each worker ahead of the reader.

    Not grain's own workers, because those of 0.2.18 took 27 s to end when a stream was left early;
    with shared memory 2 s, but left some of it behind, and a container may have little.

    Args:
        items: with `__len__` and `__getitem__`; pickled for the workers.
        workers: number of processes, which end with this iterator and with this process, even if
            that is killed, and leave SIGINT and SIGTERM to it; 0 to make each item here, when it
            is asked for.
    """
    if workers == 0:
        yield from (items[index] for index in range(len(items)))
        return
    # A forked process would inherit the locks of JAX's threads, which are not there any more.
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, context, _start, (items,))
    pending: collections.deque[futures.Future] = collections.deque()
    try:
        for index in range(len(items)):
            with _signals_held_back():
                pending.append(pool.submit(_item, index))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that start here never see SIGINT and SIGTERM, not even before their first line.

    Both come to all processes of a terminal or a job, and are the parent's to act on: it gets them
    at the end.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start(items: Any) -> None:
    global _items
    _items = items
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _item(index: int) -> Any:
    return _items[index]
