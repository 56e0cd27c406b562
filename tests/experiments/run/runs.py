"""Reads what a run left behind."""

import dataclasses

import jax
import numpy as np

from experiments.run.checkpoints import Checkpoints
from experiments.run.folder import SEALED, RunFolder, read_config
from experiments.run.training import experiment_from
from experiments.system import seals
from tests.experiments.rows import read_csv


def rows_of(folder):
    """The lines of metrics.csv without the speed."""
    rows = read_csv(folder / "metrics.csv")
    for row in rows:
        del row["examples_per_second"]
    return rows


def edit(folder, name, old, new):
    """Changes a file of a run by hand, and seals it."""
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    seals.accept(folder, SEALED)


def saved_steps(folder):
    """The steps that have a checkpoint, in order."""
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def state_at(folder, step):
    """The arrays of the state at a checkpoint, keys as numbers."""
    config = dataclasses.replace(read_config(folder), devices=1)
    checkpoints = Checkpoints(folder / "checkpoints", keep=None)
    state, _ = checkpoints.restore(step, experiment_from(config).first_state())
    checkpoints.close()
    return [np.asarray(without_key(leaf)) for leaf in jax.tree.leaves(state)]


def without_key(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def assert_same_run(folder, other, total_steps):
    """Both runs are finished, with the same state, metrics and test accuracy, bit for bit."""
    states = [state_at(run, total_steps) for run in (folder, other)]
    for leaf, expected in zip(*states, strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert rows_of(folder) == rows_of(other)
    summaries = [RunFolder(run).read_summary() for run in (folder, other)]
    names = ("status", "steps", "checkpoint_epoch", "validation_accuracy", "test_accuracy")
    first, second = ({name: getattr(summary, name) for name in names} for summary in summaries)
    assert first == second
    assert first["status"] == "finished"
