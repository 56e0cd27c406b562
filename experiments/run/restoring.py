"""Restores trained parameters from a run folder, and measures them on each split."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run.checkpoints import CheckpointError, Checkpoints
from experiments.run.experiment import Experiment
from experiments.run.folder import RunFolder, read_config
from experiments.run.training import experiment_from
from experiments.step.train_step import TrainState
from experiments.system.command_line import ArgumentError


class Restored(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        experiment: what the run computed with.
        state: the state of training after `step`.
        step: number of steps before the checkpoint.
    """

    experiment: Experiment
    state: TrainState
    step: int


def restore(folder: Path, step: int | None = None, **changed: Any) -> Restored:
    """Restores a run. It writes nothing to the folder, so the run may still be in progress.

    Args:
        folder: the run folder.
        step: the step of a checkpoint; None for the best epoch's.
        **changed: options that replace those of the run, such as `devices`; None keeps them.

    Raises:
        ArgumentError: if it is no run folder, or `step` is not one of its checkpoints.
        DatasetError: if the data set is not there.
        CheckpointError: if the checkpoint cannot be read.
    """
    # These options have no meaning for an evaluation.
    changed |= {"parallelism": "jit", "batch_statistics": "synchronised"}
    given = {name: value for name, value in changed.items() if value is not None}
    config = dataclasses.replace(read_config(folder), **given)
    path = RunFolder(folder).checkpoints
    if not path.is_dir():
        raise ArgumentError(f"{folder} has no checkpoints: the run stopped before the first one")
    experiment = experiment_from(config, folder)
    with contextlib.closing(Checkpoints(path, keep=None)) as checkpoints:
        known = checkpoints.steps()
        chosen = checkpoints.best_step() if step is None else step
        if step is None and (best := _best_step(folder)) not in (None, chosen):
            raise CheckpointError(
                f"the checkpoint of the best epoch, {path / str(best)}, is missing: choose another "
                f"one by --step ({', '.join(map(str, known))})"
            )
        if chosen not in known:
            there = ", ".join(map(str, known)) or "none"
            raise ArgumentError(f"--step must be a checkpoint of the run ({there}), got {chosen}")
        state, _ = checkpoints.restore(chosen, experiment.first_state())
    return Restored(experiment, state, chosen)


def _best_step(folder: Path) -> int | None:
    """Returns the step of a finished run's best epoch; None if the run is not finished."""
    summary = RunFolder(folder).read_summary()
    if summary is None or not summary.is_finished or summary.checkpoint_epoch is None:
        return None
    return summary.checkpoint_epoch * summary.steps_per_epoch


def accuracy_and_loss(experiment: Experiment, state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns accuracy and cross-entropy on each split, with the label noise of training."""
    feeds = {name: getattr(experiment, name) for name in ("train", "validation", "test")}
    return {
        name: {
            "examples": feed.examples,
            **experiment.evaluate(state.params, state.stats, feed)._asdict(),
        }
        for name, feed in feeds.items()
    }
