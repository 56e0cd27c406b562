"""A training run from start to end: its data, its folder, its loop."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import data
from experiments.config.config import Config
from experiments.config.recipe import Recipe, filled_in, resolve
from experiments.run.experiment import Experiment, experiment_of
from experiments.run.folder import RunFolder, as_json
from experiments.run.loop import NonFiniteLossError, Run
from experiments.step.layout import layout_of
from experiments.system import files, processes
from experiments.system.command_line import ArgumentError
from experiments.system.interruption import Interruption, SharedInterruption


def train(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Trains as configured; returns the summary that it also writes to the run folder.

    Args:
        config: the options; to resume a run, those of its folder.
        resume: a run folder whose last checkpoint training continues from.

    Raises:
        ArgumentError: if the options do not fit the data, or the run folder exists or cannot be
            made.
        DatasetError: if the data set is not there.
        CheckpointError: if a checkpoint cannot be read.
        NonFiniteLossError: if a loss is not finite; the message names the step.
        KeyboardInterrupt: on Ctrl-C, after the current launch, with a checkpoint of it. Then, and
            after a SIGTERM, which returns, the status in the summary is "interrupted". If there
            are several processes, Ctrl-C ends one at once.
    """
    if resume is not None:
        summary = RunFolder(resume).read_summary()
        if summary.get("status") == "finished":
            return summary
    with contextlib.ExitStack() as stack:
        shared = jax.process_count() > 1
        interruption = stack.enter_context(SharedInterruption() if shared else Interruption())
        if resume is None:
            processes.from_first(lambda: _check_output(config.output))  # before the data is read
        if shared:
            stack.enter_context(processes.last_words(_last_words(resume or config.output)))
        run = None
        try:
            experiment = experiment_from(config)
            every = config.checkpoint_every or _usual_interval(experiment)
            output = config.output or _new_folder(experiment.recipe)
            config = _with_defaults(config, experiment.recipe, every, output)
            folder = stack.enter_context(contextlib.closing(_open(output, config, resume)))
            print(" ".join(f"{name}={value}" for name, value in as_json(config).items()))
            run = Run(experiment, folder, every, config.keep_checkpoints)
            stack.enter_context(contextlib.closing(run))
            run.train(interruption)
            return run.finish(interruption)
        except NonFiniteLossError as error:
            if run is not None:
                run.write_summary(str(error))
            raise
        except jax.errors.JaxRuntimeError as error:
            if shared:
                processes.abandon(error)
            raise


def experiment_from(config: Config) -> Experiment:
    """Loads the data and builds the experiment that the options describe.

    Raises:
        ArgumentError: if the options contradict each other, the data or the devices.
        DatasetError: if the data set is not there, or processes have different ones.
    """
    recipe = resolve(config)
    layout = layout_of(recipe, config)
    source = config.source(config.seed)
    dataset = processes.agreed(lambda: data.load(source), lambda loaded: loaded.fingerprint, "data")
    return experiment_of(recipe, dataset, layout)


def _usual_interval(experiment: Experiment) -> int:
    """Returns the steps between checkpoints."""
    epochs = data.dataset_spec(experiment.recipe.dataset).checkpoint_epochs
    return epochs * experiment.steps_per_epoch


def _new_folder(recipe: Recipe) -> Path:
    dataset = data.base_name(recipe.dataset)
    return files.new_folder(f"{dataset}-{recipe.method}-seed{recipe.seed}")


def _with_defaults(config: Config, recipe: Recipe, every: int, output: Path) -> Config:
    """Returns all options with their values, as the run folder has them."""
    return dataclasses.replace(
        filled_in(config, recipe),
        checkpoint_every=every,
        data_dir=config.data_dir and config.data_dir.resolve(),
        output=output,
    )


def _last_words(folder: Path | None) -> str:
    return (
        "error: this process was ended; if it says above that a task died or that a connection is "
        "lost, another process of the run is gone. Start all of them again with "
        f"--resume {folder or 'and the run folder'}: the run resumes from its last checkpoint\n"
    )


def _check_output(path: Path | None) -> str:
    if path is not None:
        try:
            files.check_new(path)
        except OSError as error:
            raise ArgumentError(f"--output must be a new folder: {error}") from error
    return ""


def _open(output: Path, config: Config, resume: Path | None) -> RunFolder:
    """Returns the folder to write to, which the first process makes and locks."""
    opened = []

    def open_() -> str:
        try:
            if resume is None:
                folder = RunFolder.create(output, as_json(config))
            else:
                folder = RunFolder(resume)
            folder.lock()
        except OSError as error:
            raise ArgumentError(f"--output must be a folder to write to: {error}") from error
        opened.append(folder)
        return str(folder.path)

    path = Path(processes.from_first(open_))
    return opened[0] if opened else RunFolder(path, writes=False)
