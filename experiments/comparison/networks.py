"""The trained networks of a comparison, kept to be measured later.

networks/PART/       parameters and batch statistics of some runs, an orbax checkpoint
networks/PART.json   which runs
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.comparison.replicas import Population
from experiments.config.recipe import Recipe
from experiments.run.checkpoints import Checkpoints
from experiments.system import schema, seals

_FOLDER = "networks"
_ONLY = 0


class Kept(NamedTuple):
    """The networks of the best epochs. The first axis of every array is the run."""

    params: Any
    stats: Any


def keep(folder: Path, name: str, runs: Sequence[Recipe], population: Population) -> None:
    """Writes the networks of some runs of the comparison in `folder`.

    Args:
        folder: folder of the comparison.
        name: name of this part of the comparison.
        runs: what was trained, at most as many as there are replicas.
        population: the replicas after the last epoch.
    """
    path = folder / _FOLDER / name
    kept = jax.tree.map(
        lambda x: np.asarray(x)[: len(runs)], Kept(population.params, population.stats)
    )
    with contextlib.closing(Checkpoints(path, keep=1)) as checkpoints:
        checkpoints.save(_ONLY, kept, {})
    # Last, since a part without it is not read.
    seals.write_sealed(
        folder, {f"{_FOLDER}/{name}.json": json.dumps(list(map(_as_json, runs))) + "\n"}
    )


def read_networks(folder: Path, runs: Sequence[Recipe], like: Kept) -> Kept | None:
    """Returns the networks of some runs, in their order; None if one of them was not kept.

    Args:
        folder: folder of the comparison.
        runs: runs that share a program.
        like: arrays or shapes of one network.

    Raises:
        CheckpointError, ArgumentError: if a file is damaged.
    """
    asked = list(map(_as_json, runs))
    found: list[Any] = [None] * len(asked)
    for path in sorted((folder / _FOLDER).glob("*.json")):
        known = schema.json_as(
            list[list[Any]], seals.read_sealed(folder, f"{_FOLDER}/{path.name}"), path
        )
        if not any(run in known for run in asked):
            continue
        count = len(known)
        shapes = jax.tree.map(lambda x, n=count: np.empty((n, *x.shape), x.dtype), like)
        with contextlib.closing(Checkpoints(path.with_suffix(""), keep=None)) as checkpoints:
            kept, _ = checkpoints.restore(_ONLY, shapes)
        for place, run in enumerate(asked):
            if run in known:
                index = known.index(run)
                found[place] = jax.tree.map(lambda x, n=index: x[n], kept)
    if any(network is None for network in found):
        return None
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def _as_json(recipe: Recipe) -> list[Any]:
    """Returns the key of a run as JSON values."""
    return json.loads(json.dumps(recipe.key))
