"""Makes the items of a sequence ahead of time, in worker processes."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

_SECONDS_BETWEEN_LOOKS = 1.0
# The sequence of a worker process.
_items: Any = None


class WorkerError(Exception):
    """A worker process ended before its work."""


def made_ahead(items: Any, workers: int) -> Iterator[Any]:
    """Yields `items[0]`, `items[1]` and so on, in order, made ahead: at most two per worker.

    It does not use grain's own workers. Those of grain 0.2.18 take 27 s to end when a stream is
    left early. With shared memory they take 2 s, but do not free all of it, and a container may
    have little.

    Args:
        items: a sequence with `__len__` and `__getitem__`; pickled for the workers.
        workers: number of processes; 0 to make each item in this process when it is needed.
            Workers ignore SIGINT and SIGTERM. They end with this iterator, and with this process
            even if it is killed.

    Raises:
        WorkerError: if a worker process ends, for example killed for its memory.
    """
    if workers == 0:
        yield from (items[index] for index in range(len(items)))
        return
    # A forked process would inherit the locks of JAX's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, context, _start, (items,))
    processes: Any = pool._processes  # a dictionary that it fills
    pending: collections.deque[futures.Future] = collections.deque()
    try:
        for index in range(len(items)):
            with _signals_held_back():
                pending.append(pool.submit(_item, index))
            if len(pending) > 2 * workers:
                yield _result_of(pending.popleft(), processes)
        while pending:
            yield _result_of(pending.popleft(), processes)
    except futures.BrokenExecutor as error:
        # The pool only terminates the others, which ignore that, and waits for them for ever.
        for process in list(processes.values()):
            process.kill()
        raise WorkerError(
            "a process that decodes images has ended, perhaps for lack of memory: fewer --workers "
            "need less"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result_of(future: futures.Future, processes: Mapping[Any, Any]) -> Any:
    """Waits for a result, or until a process has ended.

    If it was killed while it wrote a result, the pool waits for the rest for ever.
    """
    while True:
        finished, _ = futures.wait([future], _SECONDS_BETWEEN_LOOKS)
        if finished:
            return future.result()
        if not all(process.is_alive() for process in list(processes.values())):
            raise futures.BrokenExecutor("a process has ended")


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hides SIGINT and SIGTERM from processes that start inside, even before their first line.

    A terminal or a job sends both signals to all its processes, but only the parent must act on
    them. It gets them at the end.
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
