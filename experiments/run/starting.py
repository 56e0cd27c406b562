"""Parameters of an earlier run, from which another one starts."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run.checkpoints import Checkpoints, name_of
from experiments.run.folder import RunFolder, read_config
from experiments.system.command_line import ArgumentError

# The last layer, which has the classes of its own data set.
LAST = "head"


def start_of(run: str) -> dict[str, np.ndarray]:
    """Returns the parameters of a run's best epoch by name, without the last layer's.

    The data of that run are not read.

    Args:
        run: path of its folder; none if it is empty.

    Raises:
        ArgumentError: if it is no run folder, or has no checkpoint.
        CheckpointError: if the checkpoint cannot be read.
    """
    if not run:
        return {}
    folder = Path(run).expanduser()
    read_config(folder)  # says if it is no run folder
    path = RunFolder(folder).checkpoints
    if not path.is_dir():
        raise ArgumentError(f"--from-checkpoint {folder} has no checkpoints")
    with contextlib.closing(Checkpoints(path, keep=None)) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise ArgumentError(f"--from-checkpoint {folder} has no checkpoints")
        known = checkpoints.parameters(step)
    return {name: leaf for name, leaf in known.items() if name.split(".")[0] != LAST}


def check_start(params: Any, start: dict[str, np.ndarray], model: str) -> None:
    """Refuses parameters of another network.

    Raises:
        ArgumentError: if a parameter has no counterpart of its shape, except in the last layer.
    """
    there = {name: leaf.shape for name, leaf in _named(params) if name.split(".")[0] != LAST}
    given = {name: leaf.shape for name, leaf in start.items()}
    for name in sorted(there | given):
        if there.get(name) != given.get(name):
            of_both = (f"{known.get(name, 'missing')}" for known in (given, there))
            raise ArgumentError(
                f"--from-checkpoint has another network than --model {model}: the shape of {name} "
                f"is {' and '.join(of_both)}"
            )


def started(params: Any, start: dict[str, np.ndarray]) -> Any:
    """Returns new parameters, with those of `start` in their places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(start.get(name_of(jax.tree_util.keystr(path)), leaf)), params
    )


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(name_of(jax.tree_util.keystr(path)), leaf) for path, leaf in leaves]
