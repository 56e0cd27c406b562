"""Several processes that compute one run, each with its own devices.

Every process runs the same program. Only the first one writes the run folder. All of them write
their parts of a checkpoint, so the folder must be on a shared file system.
"""

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

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
    """Joins the other processes. Must come before any other use of JAX.

    Args:
        distributed: whether there are other processes.
        coordinator_address: host and port of the first process. This and the next two are None
            where JAX finds them, as on TPUs and under Slurm.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        heartbeat_timeout: seconds of silence after which a process counts as gone, and the others
            end.

    Raises:
        ArgumentError: if only some of these are given, or the others cannot be reached.
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
            "three, or none where JAX finds them (on TPUs and under Slurm)"
        )
    # JAX 0.7 knows only the first one.
    taken = inspect.signature(jax.distributed.initialize).parameters
    timeouts: dict[str, Any] = {
        name: heartbeat_timeout
        for name in ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")
        if name in taken
    }
    bound = {}
    if process_id == 0 and _is_loopback(str(coordinator_address)):
        # Otherwise the first process listens on every network of its machine.
        bound["coordinator_bind_address"] = coordinator_address
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, **timeouts, **bound
        )
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"--distributed: {str(error).splitlines()[0]}") from error


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")


def is_first() -> bool:
    """Returns whether this is the first process, which writes the files of the run."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """Returns, in every process, what `make` returns in the first one.

    Raises:
        ArgumentError: in every process, if `make` raises it in the first one.
    """
    if jax.process_count() == 1:
        return make()
    message = {}
    if is_first():
        try:
            message = {"value": make()}
        except ArgumentError as error:
            message = {"error": _cut(error)}
    message = _from_all(message)[0]
    if "error" in message:
        raise ArgumentError(message["error"])
    return message["value"]


def agreed(make: Callable[[], T], text_of: Callable[[T], str], name: str) -> T:
    """Returns what `make` returns in this process, if it is the same in all processes.

    Args:
        make: makes the value of this process.
        text_of: maps the value to the text that must be the same.
        name: what the value is, for the message.

    Raises:
        ArgumentError: in every process, if `make` raises a ValueError in one, or values differ.
    """
    if jax.process_count() == 1:
        return make()
    made, message = [], ""
    try:
        made.append(make())
        message = hashlib.sha256(text_of(made[0]).encode()).hexdigest()
    except ValueError as error:
        message = f"error: {_cut(error)}"
    messages = _from_all(message)
    for number, message in enumerate(messages):
        if message.startswith("error: "):
            raise ArgumentError(f"process {number}: {message.removeprefix('error: ')}")
    if odd := [number for number, message in enumerate(messages) if message != messages[0]]:
        raise ArgumentError(
            f"all processes must have the same {name}: process {odd[0]} differs from process 0"
        )
    return made[0]


def _from_all(message: Any) -> list[Any]:
    """Returns the message of each process, JSON values of at most `_MESSAGE_BYTES`."""
    padded = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    received = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [json.loads(np.asarray(row, np.uint8).tobytes()) for row in received]


def _cut(error: Exception) -> str:
    # JSON may escape a character by twelve bytes.
    return str(error)[: _MESSAGE_BYTES // 16]


def is_lost_peer(error: Exception) -> bool:
    """Returns whether an error of JAX may come from another process that is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def abandon(error: Exception) -> NoReturn:
    """Ends this process at once. JAX would wait for another process, which may be gone."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


# If a peer is silent, JAX ends this process from a background thread, without an exception. Only
# another process can still explain that.
_LAST_WORDS = "import sys; sys.stdin.read() == 'left' or sys.stderr.write(sys.argv[1])"


@contextlib.contextmanager
def last_words(message: str) -> Iterator[None]:
    """Writes `message` to standard error if the process ends inside this context."""
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
