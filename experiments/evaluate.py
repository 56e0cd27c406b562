"""Restores a run and measures it on each split.

    python -m experiments.evaluate runs/RUN

prints accuracy and loss of the best checkpoint, and writes them to evaluation.json in the run
folder. What else there is to measure of trained parameters belongs into `MEASURES`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import command_line, data, runs, train
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.config import ArgumentError
from experiments.evaluation import num_examples
from experiments.experiment import Experiment
from experiments.training import TrainState

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which parameters are measured."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    step: int | None = None
    """Of the checkpoint (default: the best epoch's)."""
    data_dir: Path | None = None
    """Where TFDS has prepared the data set, if not where it was in training."""
    devices: int | None = None
    """So many devices (default: as in training, all if it said nothing)."""
    fsdp: int | None = None
    """Split parameters over so many of them (default: as in training)."""


def accuracy_and_loss(experiment: Experiment, state: TrainState) -> dict[str, Any]:
    """Accuracy and cross-entropy on each split, with the labels as trained (noise included)."""
    results = {}
    for name in SPLITS:
        split = getattr(experiment.dataset, name)
        measured = experiment.evaluate(state.params, state.stats, split)
        results[name] = {"examples": num_examples(split), **measured._asdict()}
    return results


# How devices share a training step is nothing to an evaluation.
_AS_ONE: dict[str, Any] = {"parallelism": "jit", "batch_statistics": "synchronised"}

# By name: functions of an experiment and a state, whose results are JSON.
MEASURES: dict[str, Callable[[Experiment, TrainState], dict[str, Any]]] = {
    "accuracy_and_loss": accuracy_and_loss,
}


def evaluate(arguments: Arguments) -> dict[str, Any]:
    """Measures a run; returns what it also writes to evaluation.json.

    Raises:
        ArgumentError: if `run` is no run folder, or `step` is not one of its checkpoints.
        DatasetError: if the data set is not there.
        CheckpointError: if the checkpoint cannot be read.
    """
    config = train.load_config(arguments.run)
    names = ("data_dir", "devices", "fsdp")
    given = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    config = dataclasses.replace(config, **given | _AS_ONE)
    folder = runs.RunFolder(arguments.run)
    if not folder.checkpoints.is_dir():
        raise ArgumentError(f"{arguments.run} has no checkpoints: it was stopped before the first")
    experiment = Experiment(config)
    # To read alone: the run may still be going on.
    with contextlib.closing(Checkpoints(folder.checkpoints, keep=None)) as checkpoints:
        step = arguments.step if arguments.step is not None else checkpoints.best_step()
        if step is None or step not in checkpoints.steps():
            there = ", ".join(map(str, checkpoints.steps())) or "none"
            raise ArgumentError(f"--step must be a checkpoint of the run ({there}), got {step}")
        state, _ = checkpoints.restore(step, experiment.state)
    results: dict[str, Any] = {"step": step}
    results |= {name: measure(experiment, state) for name, measure in MEASURES.items()}
    folder.write_json("evaluation.json", results)
    return results


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = command_line.parse(Arguments, __doc__ or "", args)
    try:
        results = evaluate(arguments)
    except (ArgumentError, data.DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    print(f"checkpoint of step {results['step']}")
    for name, row in results["accuracy_and_loss"].items():
        print(
            f"{name:10}  accuracy {100 * row['accuracy']:6.2f} %  loss {row['loss']:.4f}  "
            f"on {row['examples']} examples"
        )


if __name__ == "__main__":
    main()
