"""Several processes that make one run together, each with devices of its own.

Every process runs the same program. The first one alone writes the run folder; all of them write
their part of a checkpoint, for which the folder must be on a file system that they share.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.system.command_line import ArgumentError

_MESSAGE_BYTES = 8192

T = TypeVar("T")


def join(
    distributed: bool,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout: int,
) -> None:
    """Joins the other processes; before anything else is asked of JAX.

    Args:
        distributed: whether there are others.
        coordinator_address: host and port of the first process; with the next two, None where JAX
            finds them by itself, as on TPUs and under Slurm.
        num_processes: how many there are.
        process_id: which one this is.
        heartbeat_timeout: seconds after which a process that is silent counts as gone; the others
            are then ended.

    Raises:
        ArgumentError: if some are missing, or the others cannot be reached.
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if heartbeat_timeout < 1:
        raise ArgumentError(f"--heartbeat-timeout must be at least 1, got {heartbeat_timeout}")
    if not distributed:
        if any(given):
            raise ArgumentError(
                "--coordinator-address, --num-processes and --process-id need --distributed"
            )
        return
    if any(given) and not all(given):
        raise ArgumentError(
            "--coordinator-address, --num-processes and --process-id belong together: give all "
            "three, or none where JAX finds them by itself"
        )
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"--distributed: {str(error).splitlines()[0]}") from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns in the first process, in all of them.

    Raises:
        ArgumentError: in all of them, if it is raised there.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, str] = {}
    if is_first():
        try:
            message["value"] = make()
        except ArgumentError as error:
            message["error"] = str(error)[: _MESSAGE_BYTES // 8]
    padded = json.dumps(message).encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    message = json.loads(np.asarray(received, np.uint8).tobytes())
    if "error" in message:
        raise ArgumentError(message["error"])
    return message["value"]


def agreed(make: Callable[[], T], text_of: Callable[[T], str], name: str) -> T:
    """What `make` returns here, once all processes have returned the same.

    Args:
        make: returns this process's.
        text_of: in which it must be the same.
        name: what it is.

    Raises:
        ArgumentError: in all of them, if `make` raises a ValueError in one, or if they differ.
    """
    if jax.process_count() == 1:
        return make()
    made, message = [], ""
    try:
        made.append(make())
        message = hashlib.sha256(text_of(made[0]).encode()).hexdigest()
    except ValueError as error:
        message = f"error: {str(error)[: _MESSAGE_BYTES // 8]}"
    padded = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    received = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    messages = [json.loads(np.asarray(row, np.uint8).tobytes()) for row in received]
    for number, message in enumerate(messages):
        if message.startswith("error: "):
            raise ArgumentError(f"process {number}: {message.removeprefix('error: ')}")
    if odd := [number for number, message in enumerate(messages) if message != messages[0]]:
        raise ArgumentError(
            f"all processes must have the same {name}: process {odd[0]} has another than process 0"
        )
    return made[0]


def abandon(error: Exception) -> NoReturn:
    """Ends this process after what may be the loss of another, for which JAX would wait."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


# JAX ends a process whose peer is silent from a thread of its own, without an exception: another
# process has to say what that means.
_LAST_WORDS = "import sys; sys.stdin.read() == 'left' or sys.stderr.write(sys.argv[1])"


@contextlib.contextmanager
def last_words(message: str) -> Iterator[None]:
    """Has `message` written to standard error if this process ends before the context does."""
    with subprocess.Popen(
        [sys.executable, "-c", _LAST_WORDS, message],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as witness:
        try:
            yield
        finally:
            witness.communicate("left")
