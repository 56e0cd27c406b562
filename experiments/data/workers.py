"""Makes the items of a sequence ahead of time, in worker processes."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(Exception):
    """A worker process ended before its work."""


def made_ahead(items: Any, workers: int) -> Iterator[Any]:
    """Yields `items[0]`, `items[1]` and so on, in order, made ahead: one or two per worker.

    Every worker makes each `workers`-th item and has a pipe of its own: a worker that is killed
    while it writes ends its pipe, and holds no lock. Grain's own workers are not used. Those of
    grain 0.2.18 take 27 s to end when a stream is left early.

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
    with contextlib.ExitStack() as stack:
        # At the end of Python, a generator is left too late.
        atexit.register(stack.close)
        stack.callback(atexit.unregister, stack.close)
        pipes = [
            stack.enter_context(_worker(items, first, workers))
            for first in range(min(workers, len(items)))
        ]
        for index in range(len(items)):
            try:
                item, error = pipes[index % workers].recv()
            except (EOFError, OSError) as ended:
                raise WorkerError(
                    "a process that decodes images has ended, perhaps for lack of memory: fewer "
                    "--workers need less"
                ) from ended
            if error is not None:
                raise error
            yield item


@contextlib.contextmanager
def _worker(items: Any, first: int, step: int) -> Iterator[Connection]:
    """Starts a process that makes the items `first`, `first + step` and so on; yields its pipe."""
    # A forked process would inherit the locks of JAX's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_make, args=(items, sender, first, step))
    resource_tracker.ensure_running()  # which would let the signals through
    with _signals_held_back():
        process.start()
    sender.close()
    try:
        yield receiver
    finally:
        receiver.close()
        process.kill()
        process.join()


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


def _make(items: Any, pipe: Connection, first: int, step: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for index in range(first, len(items), step):
        try:
            made = items[index], None
        except Exception as error:
            made = None, error
        try:
            pipe.send(made)  # waits while the pipe is full
        except OSError:
            return  # nobody reads


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
